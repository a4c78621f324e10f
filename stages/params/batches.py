"""The section `batches`: immutable, named deliveries of images, in order of arrival."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.runtime.params_file import NonEmpty, ParamsError, Section, check, params_path, read_params

Role = Literal["pretrain", "finetune"]
ROLES: tuple[Role, ...] = ("pretrain", "finetune")
NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


class Batch(Section):
    """One delivery. `source` is a URI; a relative path resolves against SYNSET_INCOMING."""

    role: Role
    source: NonEmpty
    """Where the images come from, and which of them: `sample:target?seed=1`, `imagenette?images_per_class=50`.

    A relative path resolves against SYNSET_INCOMING. Raw data is made once, so this is all that ingest depends on.
    """
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Digest of the source when it was accepted (stages/data/sources/digests.py); ingest refuses other content."""
    accept_drift: str | None = None
    """Reason to accept this batch although it drifts from the reference."""


def load_batches(path: Path | None = None) -> dict[str, Batch]:
    """All batches, checked, in order of arrival.

    Raises:
        ParamsError: a name that DVC would drop or misread, or a batch that is wrong.
    """
    return check_batches(read_params(path).get("batches"), path)


def check_batches(values: Any, path: Path | None = None) -> dict[str, Batch]:
    """The section's plain values as typed batches."""
    where = path or params_path()
    if not isinstance(values, dict) or not values:
        raise ParamsError(f"{where}: `batches` must name at least one batch")
    for name in values:
        # An unquoted 2026-11-23 is a date to YAML, and DVC drops such a stage without a word.
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ParamsError(
                f"{where}: `batches` has a batch named `{name}`; a name is 1 to 63 of a-z, 0-9, _ and -, "
                f"begins with a letter, and has no dot or slash (a date: `d-2026-11-23`)"
            )
    return {name: check(f"batches.{name}", value, Batch, path) for name, value in values.items()}


def load_batch(name: str, path: Path | None = None) -> Batch:
    """One batch by name.

    Raises:
        ParamsError: no such batch, or it is wrong.
    """
    batches = load_batches(path)
    if name not in batches:
        raise ParamsError(f"{path or params_path()}: no batch named `{name}` (there are: {', '.join(batches)})")
    return batches[name]
