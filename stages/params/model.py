"""The section `model`: the architecture and the size of what it sees."""

from typing import Annotated

from pydantic import Field

from stages.params.load import Section


class Model(Section):
    """Shared by backbone, fine-tuned model and the one from scratch."""

    architecture: str
    """A torchvision classification model by name, as in `torchvision.models.list_models`."""
    image_size: Annotated[int, Field(ge=16, le=1024)]
    """Side in pixels of the square crop for training and evaluation."""
