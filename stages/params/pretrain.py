"""The section `pretrain`: how the backbone is made."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from stages.params.training.recipe import Recipe
from stages.runtime.params_file import AtLeastZero, Count, NonEmpty, Positive, Section, Share

SelfSupervisedMethod = Literal["simclr", "vicreg"]


class SelfSupervised(Section):
    """Two crops of each image, to be told from those of other images (simclr) or to have equal features (vicreg)."""

    width: Annotated[int, Field(ge=8)] = 512
    """Of the layers of the projector."""
    outputs: Annotated[int, Field(ge=8)] = 128
    """Dimensions of the projector's output."""
    temperature: Positive = 0.2
    """Of the softmax of SimCLR."""
    invariance: AtLeastZero = 25.0
    variance: AtLeastZero = 25.0
    covariance: AtLeastZero = 1.0
    """Weights of VICReg's three terms."""
    jitter: Share = 0.5
    """Strength of the colour jitter."""
    grey: Share = 0.2
    """Share of crops that become grey."""
    blur: Share = 0.0
    """Share of crops that are blurred."""
    neighbours: Count = 20
    """Number of neighbours that vote in the k-NN accuracy on val."""
    neighbour_images: Count = 10_000
    """Maximum number of labelled training images to search for neighbours."""


class Pretrain(Recipe):
    """`method: none` writes a random backbone by `seed`, or the one that `weights` names."""

    method: Literal["supervised", SelfSupervisedMethod, "none"] = "supervised"
    weights: NonEmpty | None = None
    """Weights to start from: `torchvision`, `torchvision:IMAGENET1K_V1` (a named set), or the path of a safetensors
    file with torchvision's names. Null: random weights."""
    self_supervised: SelfSupervised = SelfSupervised()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        without_labels = self.method in get_args(SelfSupervisedMethod)
        if without_labels and (self.mixup or self.cutmix or self.adversarial):
            raise ValueError(
                f"`method: {self.method}` knows no labels: `mixup`, `cutmix` and `adversarial` must be off"
            )
        if without_labels and self.patience and self.monitor not in ("train_loss", "knn_top1"):
            raise ValueError(
                f"`patience` watches {self.monitor}, which `method: {self.method}` does not measure; `monitor` must be "
                "train_loss or knn_top1"
            )
        if self.monitor == "knn_top1" and not without_labels:
            raise ValueError("`monitor: knn_top1` is for `method: simclr` and `vicreg`")
        return self
