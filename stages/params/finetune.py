"""The section `finetune`: how the backbone becomes a model of the target classes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.params.training.recipe import Recipe
from stages.runtime.params_file import Count, Positive, Section


class Lora(Section):
    """Low-rank updates (Hu et al. 2022)."""

    rank: Count = 8
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""


class Finetune(Recipe):
    """The same recipe trains the model from scratch, for comparison."""

    strategy: Literal["head", "last_block", "full", "bias", "lora"] = "full"
    """`head`: only the new head; `last_block`: the head and the last block; `full`: every weight; `bias`: the head,
    biases and norms; `lora`: the head and low-rank updates."""
    epochs: Count = 20
    batch_size: Annotated[int, Field(ge=4)] = 32
    lr: Positive = 0.05
    """Peak learning rate of the head, and of every weight when training from scratch."""
    backbone_lr: Positive = 0.01
    """Peak learning rate of all else that the strategy trains."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """For `full`: a block's learning rate is that of the block after it, times this."""
    lora: Lora = Lora()
    scratch: bool = True
    """Also train the same architecture from random weights, with the same recipe and number of steps."""

    @model_validator(mode="after")
    def _knows_labels(self) -> Self:
        if self.monitor == "knn_top1":
            raise ValueError("`monitor: knn_top1` is for pretraining without labels")
        return self
