"""The section `training`: how any training runs on this machine."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.load import Section


class Training(Section):
    """These decide bytes together with the kind of machine, so they are parameters and never guessed from the cores."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] = 2
    """Of torch and of DALI. One and two threads give different bits."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """`auto`: bf16 autocast where the hardware has bf16 arithmetic, else float32."""
    channels_last: bool = True
    deterministic: bool = True
