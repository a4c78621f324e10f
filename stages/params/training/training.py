"""The section `training`: how any training runs on this machine."""

from typing import Literal, Self

from pydantic import model_validator

from stages.runtime.params_file import Count, Section


class Training(Section):
    """With the kind of machine, these decide bytes: so they are parameters and are not guessed from the cores."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = 2
    """Threads of torch and of DALI. One and two threads give different bits."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 autocast where the hardware has bf16 arithmetic, else float32. `fp16` scales the loss."""
    channels_last: bool = True
    deterministic: bool = True
    compile: bool = False
    """torch.compile: minutes at the start, then faster steps. Needs a C++ compiler on a CPU."""
    world_size: Count = 1
    """Processes that share each batch, one per GPU (DDP, started by torchrun)."""
    nodes: Count = 1
    """Machines that these processes run on (docs/scale-out.md)."""
    allow_inexact: bool = False
    """Resume a checkpoint of another world size. The result then has not the bytes of any uninterrupted run."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.world_size % self.nodes:
            raise ValueError(f"`world_size` ({self.world_size}) is no multiple of `nodes` ({self.nodes})")
        return self
