"""Checkpoint files. A killed training that resumes from one ends in the same bytes as an undisturbed one."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from stages.runtime.command import StageError
from stages.runtime.files import replaced_file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes the state aside and renames it, so that a kill leaves the old checkpoint or the new one."""
    # Through memory: torch's own writer reports a full disk as some other error.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replaced_file(path) as aside:
        aside.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state on the CPU, or None where there is none. Tensors and plain values only: nothing is unpickled.

    Raises:
        StageError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StageError(f"{path} is damaged; remove it to begin anew: {str(error).splitlines()[0]}") from error
