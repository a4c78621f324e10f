"""The section `finetune`: how the backbone becomes a model of the target classes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.params.training.recipe import Positive, Recipe
from stages.runtime.params_file import Section


class Lora(Section):
    """Low-rank updates (Hu et al. 2022)."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""


class Finetune(Recipe):
    """The recipe also trains the model from scratch that the comparison needs."""

    strategy: Literal["head", "last_block", "full", "bias", "lora"] = "full"
    """What is trained: the new head alone, with it the last block, every weight, biases and norms,
    or low-rank updates."""
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=4)] = 32
    lr: Positive = 0.05
    """The peak for the head, and for every weight when training from scratch."""
    backbone_lr: Positive = 0.01
    """The peak for whatever else the strategy trains."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of `full`: each block's learning rate is that of the block after it, times this."""
    lora: Lora = Lora()
    scratch: bool = True
    """Also train the same architecture from random weights, with the same recipe and steps."""

    @model_validator(mode="after")
    def _knows_labels(self) -> Self:
        if self.monitor == "knn_top1":
            raise ValueError("`monitor: knn_top1` is for pretraining without labels")
        return self
