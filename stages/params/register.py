"""The section `register`: the model's name in the MLflow registry."""

from typing import Annotated

from pydantic import Field

from stages.params.load import Section


class Register(Section):
    """One name a product; versions are counted by MLflow."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
