"""The section `pretrain`: how the backbone is made."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.load import Section

Positive = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]


class Pretrain(Section):
    """`method: none` writes a seeded random backbone."""

    method: Literal["supervised", "none"] = "supervised"
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=4)] = 64
    lr: Positive = 0.1
    """Peak of the one-cycle schedule."""
    weight_decay: AtLeastZero = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of all steps in which the learning rate rises."""
    min_crop_area: Annotated[float, Field(gt=0, le=1)] = 0.35
    """RandomResizedCrop takes from this share of the image up to the whole."""
    seed: Annotated[int, Field(ge=0)] = 1
