"""The section `pretrain`: how the backbone is made."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.params.training.recipe import AtLeastZero, Positive, Recipe
from stages.runtime.params_file import Section


class SelfSupervised(Section):
    """Two crops of each image, which are to be told from all others (simclr) or to say the same (vicreg)."""

    width: Annotated[int, Field(ge=8)] = 512
    """Of the projector's layers."""
    outputs: Annotated[int, Field(ge=8)] = 128
    """Of the projector."""
    temperature: Positive = 0.2
    """Of SimCLR's softmax."""
    invariance: AtLeastZero = 25.0
    variance: AtLeastZero = 25.0
    covariance: AtLeastZero = 1.0
    """Weights of VICReg's three terms."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Strength of the colour jitter."""
    grey: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of crops that lose their colours."""
    blur: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of crops that are blurred."""
    neighbours: Annotated[int, Field(ge=1)] = 20
    """That vote in the k-NN accuracy on val, the curve to watch."""
    neighbour_images: Annotated[int, Field(ge=1)] = 10_000
    """How many labelled training images they are looked for among, at most."""


class Pretrain(Recipe):
    """`method: none` writes a seeded random backbone, or the one that `weights` names."""

    method: Literal["supervised", "simclr", "vicreg", "none"] = "supervised"
    weights: Annotated[str, Field(min_length=1)] | None = None
    """Weights to start from: `torchvision`, or `torchvision:IMAGENET1K_V1` for those by that name, or the path of a
    safetensors file with torchvision's names. Null: random ones."""
    self_supervised: SelfSupervised = SelfSupervised()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        without_labels = self.method in ("simclr", "vicreg")
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
