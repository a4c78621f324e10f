"""The section `model`: the architecture and the size of what it sees."""

from typing import Annotated, Literal

from pydantic import Field

from stages.runtime.params_file import Section


class Model(Section):
    """Shared by backbone, fine-tuned model and the one from scratch."""

    architecture: str
    """A torchvision classification model by name, as in `torchvision.models.list_models`."""
    image_size: Annotated[int, Field(ge=16, le=1024)]
    """Side in pixels of the square crop for training and evaluation."""
    stem: Literal["standard", "half", "small"] = "standard"
    """How much is lost before the first block. `standard`: as published, a quarter of the resolution for most. `half`:
    half of it. `small`: nothing, for images of up to 96 px. GoogLeNet keeps one pool more."""
    auxiliary_heads: bool = True
    """Of googlenet and inception_v3, in training; they need images nearly as large as the published ones."""
