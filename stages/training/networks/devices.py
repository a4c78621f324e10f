"""Where and how arithmetic is done: device, precision, memory layout, determinism."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from stages.params.training.training import Training
from stages.runtime.command import StageError


@dataclass(frozen=True)
class Compute:
    """The section `training` of params.yaml, resolved for this machine."""

    device: str
    """cpu or cuda: this process's current one."""
    dtype: torch.dtype | None
    """For autocast; None: all in float32."""
    channels_last: bool
    threads: int
    compile: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether `device` is a GPU."""
        return self.device == "cuda"

    def autocast(self) -> AbstractContextManager[object]:
        """A context of autocast, or of nothing where `dtype` is None; weights and optimiser stay in float32."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None)

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Moves the model to the device, in the memory layout that is fast for its convolutions."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout)

    @property
    def kind(self) -> str:
        """The kind of machine that decides bits, for the fingerprint."""
        name = torch.cuda.get_device_name() if self.on_gpu else torch.cpu.get_capabilities().get("cpu_name")
        return f"{self.device} {name} {str(self.dtype or torch.float32).removeprefix('torch.')}"


def set_up(training: Training) -> Compute:
    """Sets threads and determinism of this process, and returns the resolved device and precision.

    Raises:
        StageError: the parameters ask for a GPU or bf16 that this machine lacks.
    """
    if training.device == "cuda" and not torch.cuda.is_available():
        raise StageError("params.yaml: `training.device` is cuda, but torch sees no CUDA device; set it to auto or cpu")
    device = "cuda" if training.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(training.threads)
    if training.deterministic:
        # cuBLAS is deterministic only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif device == "cuda":
        torch.backends.cudnn.benchmark = True
    return Compute(device, _dtype(training, device), training.channels_last, training.threads, training.compile)


def _dtype(training: Training, device: str) -> torch.dtype | None:
    if training.precision == "bf16" and not has_bf16(device):
        raise StageError(
            f"params.yaml: `training.precision` is bf16, which this {device} does not compute; set it to auto"
        )
    if training.precision == "fp16":
        return torch.float16
    return torch.bfloat16 if training.precision != "float32" and has_bf16(device) else None


def has_bf16(device: str) -> bool:
    """Whether the hardware multiplies bf16 itself; emulated bf16 is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
