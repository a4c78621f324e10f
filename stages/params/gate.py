"""The section `gate`: what a version must show before a person decides on it."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Count, Fraction, Positive, Section, Share


class Gate(Section):
    """Absolute floors, and how the comparison with the version in force is decided."""

    min_top1: Share = 0.5
    min_worst_class: Share = 0.2
    """Recall of the worst class."""
    max_ece: Share = 0.2
    max_size_mb: Positive = 500
    """Size of the weights, in units of 1,000,000 bytes."""
    max_latency_ms: Positive = 1000
    """Median time of one image on one CPU thread."""
    margin: Fraction = 0.01
    """Non-inferiority margin: top-1 on `test`, a class or a slice may be worse by this much."""
    alpha_inferior: Annotated[float, Field(gt=0, le=0.5)] = 0.3
    """Probability that a version which is worse on `test` by the whole margin still counts as not inferior. At 0.05 and
    a thousand test images, an equally good version would pass in one case of four; `alpha` holds for any value."""
    min_n: Count = 50
    """Classes and slices with fewer images are shown, but not judged."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Joint error rate: probability that an equally good version passes."""
