"""The section `training`: how any training runs on this machine."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.runtime.params_file import Section


class Training(Section):
    """These decide bytes together with the kind of machine, so they are parameters and never guessed from the cores."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] = 2
    """Of torch and of DALI. One and two threads give different bits."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast where the hardware has bf16 arithmetic, else float32. `fp16` scales the loss."""
    channels_last: bool = True
    deterministic: bool = True
    compile: bool = False
    """torch.compile: minutes at the start, then faster steps. Needs a C++ compiler on a CPU."""
    world_size: Annotated[int, Field(ge=1)] = 1
    """Processes, one a GPU, which share each batch (DDP, started through torchrun)."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Machines that they are spread over (docs/scale-out.md)."""
    allow_inexact: bool = False
    """Go on from a checkpoint of another world size. The result then has the bytes of no undisturbed run."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.world_size % self.nodes:
            raise ValueError(f"`world_size` ({self.world_size}) is no multiple of `nodes` ({self.nodes})")
        return self
