"""The section `gate`: what a version must show before a person is asked."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Section

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Gate(Section):
    """Absolute floors, and how the comparison with the version in force is decided."""

    min_top1: Share = 0.5
    min_worst_class: Share = 0.2
    """Recall of the worst class."""
    max_ece: Share = 0.2
    max_size_mb: Positive = 500
    """Of the weights, in units of 1,000,000 bytes."""
    max_latency_ms: Positive = 1000
    """Median of one image on one thread of a CPU."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Of top-1: by this much a version may be worse on `test`, a class or a slice and still count as not inferior."""
    alpha_inferior: Annotated[float, Field(gt=0, le=0.5)] = 0.3
    """How often a version that is worse on `test` by the whole margin may count as not inferior. At 0.05, a thousand
    test images show it of an equally good version in one case of four; `alpha` holds whatever this is."""
    min_n: Annotated[int, Field(ge=1)] = 50
    """Classes and slices of fewer images are shown, not judged."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Joint error rate: how often an equally good version may pass."""
