"""The section `finetune`: how the backbone becomes a model of the target classes."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.load import Section
from stages.params.pretrain import AtLeastZero, Positive


class Finetune(Section):
    """The recipe also trains the model from scratch that the comparison needs."""

    strategy: Literal["head", "full"] = "full"
    """What is trained: the new head alone, or every weight."""
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=4)] = 32
    lr: Positive = 0.05
    """Peak of the one-cycle schedule, for the head, and for every weight when training from scratch."""
    backbone_lr: Positive = 0.01
    """The same for the pretrained weights (`full`)."""
    weight_decay: AtLeastZero = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    min_crop_area: Annotated[float, Field(gt=0, le=1)] = 0.35
    patience: Annotated[int, Field(ge=1)] | None = None
    """Early stopping after so many epochs without a lower val loss, with the weights of the best one. Null: all epochs,
    and the weights of the last."""
    scratch: bool = True
    """Also train the same architecture from random weights, with the same recipe and steps."""
    seed: Annotated[int, Field(ge=0)] = 1
