"""The section `evaluate`: what is computed on the test images."""

from typing import Annotated

from pydantic import Field

from stages.params.load import Section


class Evaluate(Section):
    """Changing these reruns evaluate and register only."""

    batch_size: Annotated[int, Field(ge=1)] = 128
    calibration_bins: Annotated[int, Field(ge=2)] = 15
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of every interval."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the intervals that have no closed form."""
    gallery: Annotated[int, Field(ge=0)] = 200
    """Test images, at most, that the report shows with what spoke for the answer."""
    seed: Annotated[int, Field(ge=0)] = 1
