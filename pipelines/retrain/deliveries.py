"""Deliveries: `<SYNSET_INCOMING>/<delivery>/<class>/*`, complete when there is a file `_READY`.

A delivery is identified by its listing (names, sizes, times), which is cheap, and by its digest (names and contents),
which is not. Digests and refusals are remembered by listing, so nothing is read twice.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.params.batches import NAME
from stages.runtime.command import StageError
from stages.runtime.files import write_json
from stages.runtime.yaml_text import is_plain_text

READY = "_READY"
Digest = Callable[[str], str]
"""Name of a delivery -> the digest of what it holds; raises StageError where that cannot be read as images."""


class UnstableError(StageError):
    """A delivery is still being written."""


@dataclass(frozen=True)
class Delivery:
    """A complete delivery that is not a batch yet."""

    name: str
    """The name of its folder, which is also the batch's source."""
    batch: str
    listing: str
    digest: str

    def entry(self) -> dict[str, str]:
        """Its entry in params.yaml."""
        return {"role": "finetune", "source": self.name, "digest": self.digest}


@dataclass
class Memory:
    """What is remembered between runs, in one file; without it, all deliveries are read again."""

    path: Path
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    """Delivery -> its `listing` and `digest`."""
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Delivery -> `listing`, `digest`, `rules` (it was judged by) and `reasons`."""
    waiting: dict[str, Any] = field(default_factory=dict)
    """The facts of the last decision not to retrain (`for`), and its `images` and `drifted`."""

    def save(self) -> None:
        """Writes it, whole or not at all."""
        write_json(self.path, {"digests": self.digests, "refused": self.refused, "waiting": self.waiting})


@dataclass
class FoundDeliveries:
    """The folder of deliveries, sorted out."""

    ready: list[Delivery] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Deliveries that cannot be read as images in folders of classes, with the reason."""
    left_alone: dict[str, str] = field(default_factory=dict)
    """Other deliveries that are not taken, with the reason."""


def remembered(path: Path) -> Memory:
    """The memory in `path`; an empty one where there is none, or none that can be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Memory(path, **{key: dict(stored[key]) for key in ("digests", "refused", "waiting")})
    except (OSError, ValueError, KeyError, TypeError):
        return Memory(path)


def find_deliveries(
    incoming: Path, batches: Mapping[str, Any], retracted: list[str], rules: str, memory: Memory, digest: Digest
) -> FoundDeliveries:
    """The new deliveries in `incoming`, and why the others are not taken.

    Args:
        batches: those that params.yaml lists, as plain values.
        retracted: names of batches that were taken back.
        rules: identifies the rules of validation; a delivery that was refused under other rules is tried again.
    """
    found = FoundDeliveries()
    taken: dict[str, str] = {}
    sources = {_folder_of(each) for each in batches.values()}
    for folder in _folders(incoming):
        name, batch = shown(folder.name), batch_name(folder.name)
        if folder.name in sources and batch not in batches:
            continue  # no delivery: somebody listed it under a name of their own
        try:
            why = _known(folder, batch, batches, retracted, memory, digest)
            if not why and batch not in batches:
                why = _new(folder, batch, taken, rules, memory, digest, found)
            if why:
                found.left_alone[name] = why
        except UnstableError as error:
            found.left_alone[name] = str(error)
        except StageError as error:
            found.unreadable[name] = str(error)
        except PermissionError as error:  # who delivers is often another user; the others must not wait for that
            found.unreadable[name] = f"{error.filename} cannot be read: {error.strerror}"
    return found


def shown(name: str) -> str:
    """A name that can be printed, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def batch_name(delivery: str) -> str:
    """The name of the batch that a delivery becomes (`2026-11-23` -> `d-2026-11-23`); empty where it cannot."""
    return next((name for name in (delivery, f"d-{delivery}") if NAME.fullmatch(name) and is_plain_text(name)), "")


def listing(folder: Path) -> str:
    """sha256 over names, sizes and times of all files of a delivery; hidden ones and the mark `_READY` do not count."""
    lines = sorted(f"{name}\0{size}\0{time}\n" for name, size, time in _files(folder))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _known(
    folder: Path, batch: str, batches: Mapping[str, Any], retracted: list[str], memory: Memory, digest: Digest
) -> str:
    """Why this is nothing new; empty if it may be new, or is accepted and unchanged."""
    if batch in retracted:
        return f"its batch {batch} was taken back"
    if batch not in batches:
        return ""
    if _folder_of(batches[batch]) != folder.name:
        return f"params.yaml has another batch {batch}; deliver it under a new name"
    accepted = batches[batch].get("digest")
    if not accepted or not (folder / READY).is_file():
        return ""
    try:
        same = _digest(folder, memory, digest) == accepted
    except UnstableError:
        raise
    except StageError:  # emptied, say
        same = False
    changed = f"changed after it was accepted as {batch}, which stays as it was; deliver what is new under a new name"
    return "" if same else changed


def _folder_of(batch: Any) -> str:
    """The delivery that a batch was made from; empty, or no folder's name, for any other source."""
    source = str(batch.get("source", "")) if isinstance(batch, dict) else ""
    return source.partition("?")[0].rstrip("/")


def _new(
    folder: Path, batch: str, taken: dict[str, str], rules: str, memory: Memory, digest: Digest, found: FoundDeliveries
) -> str:
    """Adds a delivery to those found ready, or returns the reason why not."""
    name = shown(folder.name)
    if not (folder / READY).is_file():
        return f"incomplete: it holds no {READY}"
    if not batch:
        return "its name cannot become that of a batch (a-z, 0-9, _ and -, up to 61 of them); rename the folder"
    if batch in taken:
        return f"its batch would be {batch}, as that of {taken[batch]}; rename the folder"
    taken[batch] = name
    now = listing(folder)
    refused = memory.refused.get(name, {})
    if refused.get("rules") == rules and refused.get("listing") == now:
        return f"refused before: {'; '.join(refused['reasons'])}"
    content = _digest(folder, memory, digest)
    if refused.get("rules") == rules and refused.get("digest") == content:
        return f"refused before: {'; '.join(refused['reasons'])}"
    found.ready.append(Delivery(name, batch, memory.digests[name]["listing"], content))
    return ""


def _digest(folder: Path, memory: Memory, digest: Digest) -> str:
    """The digest of a delivery, remembered by its listing.

    Raises:
        UnstableError: its listing changed meanwhile.
        StageError: it cannot be read.
    """
    before = listing(folder)
    known = memory.digests.get(folder.name, {})
    if known.get("listing") == before:
        return known["digest"]
    try:
        found = digest(folder.name)
    finally:
        if listing(folder) != before:
            raise UnstableError("still being copied: it changed while it was read")
    memory.digests[folder.name] = {"listing": before, "digest": found}
    memory.save()
    return found


def _folders(incoming: Path) -> list[Path]:
    if not incoming.is_dir():
        return []
    return sorted(each for each in incoming.iterdir() if each.is_dir() and not each.name.startswith("."))


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of each file, in any order."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        if (real := os.path.realpath(root)) in seen:
            raise StageError(f"{root} is a link to a folder that is read already; remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if name.startswith(".") or path == folder / READY:
                continue
            try:
                facts = path.stat()
            except OSError as error:
                raise StageError(f"{path} cannot be read: {error.strerror}") from None
            yield path.relative_to(folder).as_posix(), facts.st_size, facts.st_mtime_ns


def _refuse(error: OSError) -> None:
    raise StageError(f"{error.filename} cannot be read: {error.strerror}")
