"""The section `model`: the architecture and the size of its input."""

from typing import Annotated, Literal

from pydantic import Field

from stages.runtime.params_file import Section


class Model(Section):
    """Shared by the backbone, the fine-tuned model and the model from scratch."""

    architecture: str
    """Name of a torchvision classification model, as `torchvision.models.list_models` gives it."""
    image_size: Annotated[int, Field(ge=16, le=1024)]
    """Side in pixels of the square crop for training and evaluation."""
    stem: Literal["standard", "half", "small"] = "standard"
    """How much the stem, before the first block, reduces resolution. `standard`: as published, mostly to a quarter.
    `half`: to a half. `small`: not at all, for images up to 96 px. GoogLeNet keeps one pooling layer more."""
    auxiliary_heads: bool = True
    """Auxiliary heads of googlenet and inception_v3, in training; they need images nearly as large as published."""
