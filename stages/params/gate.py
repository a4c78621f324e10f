"""The section `gate`: what a version must show before a person is asked."""

from typing import Annotated

from pydantic import Field

from stages.params.load import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Gate(Section):
    """Absolute floors, and the error rate of the comparison with the version in force."""

    min_top1: Share = 0.5
    min_worst_class: Share = 0.2
    """Recall of the worst class."""
    max_ece: Share = 0.2
    max_size_mb: Annotated[float, Field(gt=0)] = 500
    """Of the weights, in units of 1,000,000 bytes."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Error rate of the exact McNemar test: how often an equal model may pass."""
