"""Deliveries: `<SYNSET_INCOMING>/<delivery>/<class>/*`, complete when there is a file `_READY`.

A delivery is identified by its listing (names, sizes, times), which is cheap, and by its digest (names and contents),
which is not. Digests and refusals are remembered by listing, so nothing is read twice.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.retrain.incoming import READY, Incoming, UnreachableError, incoming_at
from stages.params.batches import NAME
from stages.runtime.command import StageError
from stages.runtime.files import write_json
from stages.runtime.yaml_text import is_plain_text

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
    incoming: Path | str, batches: Mapping[str, Any], retracted: list[str], rules: str, memory: Memory, digest: Digest
) -> FoundDeliveries:
    """The new deliveries in `incoming`, and why the others are not taken.

    Args:
        incoming: a folder, or a URL.
        batches: those that params.yaml lists, as plain values.
        retracted: names of batches that were taken back.
        rules: identifies the rules of validation; a delivery that was refused under other rules is tried again.

    Raises:
        UnreachableError: the store does not answer.
    """
    found = FoundDeliveries()
    taken: dict[str, str] = {}
    sources = {_folder_of(each) for each in batches.values()}
    place = incoming_at(incoming)
    for folder in place.names():
        name, batch = shown(folder), batch_name(folder)
        if folder in sources and batch not in batches:
            continue  # no delivery: somebody listed it under a name of their own
        delivered = _Delivered(place, folder, memory, digest)
        try:
            why = _known(delivered, batch, batches, retracted)
            if not why and batch not in batches:
                why = _new(delivered, batch, taken, rules, found)
            if why:
                found.left_alone[name] = why
        except UnreachableError:
            raise
        except UnstableError as error:
            found.left_alone[name] = str(error)
        except StageError as error:
            found.unreadable[name] = str(error)
        except PermissionError as error:  # who delivers is often another user; the others must not wait for that
            found.unreadable[name] = f"{error.filename or f'{place}/{name}'} cannot be read: {error.strerror or error}"
    return found


def shown(name: str) -> str:
    """A name that can be printed, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def batch_name(delivery: str) -> str:
    """The name of the batch that a delivery becomes (`2026-11-23` -> `d-2026-11-23`); empty where it cannot."""
    return next((name for name in (delivery, f"d-{delivery}") if NAME.fullmatch(name) and is_plain_text(name)), "")


@dataclass(frozen=True)
class _Delivered:
    """A folder in the place of deliveries."""

    place: Incoming
    folder: str
    memory: Memory
    read: Digest

    def is_ready(self) -> bool:
        """Whether it is complete."""
        return self.place.is_ready(self.folder)

    def listing(self) -> str:
        """Changes with what it holds."""
        return self.place.listing(self.folder)

    def digest(self) -> str:
        """The digest of its contents, remembered by its listing.

        Raises:
            UnstableError: its listing changed meanwhile.
            StageError: it cannot be read.
        """
        before = self.listing()
        known = self.memory.digests.get(self.folder, {})
        if known.get("listing") == before:
            return known["digest"]
        try:
            found = self.read(self.folder)
        finally:
            if self.listing() != before:
                raise UnstableError("still being copied: it changed while it was read")
        self.memory.digests[self.folder] = {"listing": before, "digest": found}
        self.memory.save()
        return found


def _known(delivered: _Delivered, batch: str, batches: Mapping[str, Any], retracted: list[str]) -> str:
    """Why this is nothing new; empty if it may be new, or is accepted and unchanged."""
    if batch in retracted:
        return f"its batch {batch} was taken back"
    if batch not in batches:
        return ""
    if _folder_of(batches[batch]) != delivered.folder:
        return f"params.yaml has another batch {batch}; deliver it under a new name"
    accepted = batches[batch].get("digest")
    if not accepted or not delivered.is_ready():
        return ""
    try:
        same = delivered.digest() == accepted
    except (UnstableError, UnreachableError):
        raise
    except StageError:  # emptied, say
        same = False
    changed = f"changed after it was accepted as {batch}, which stays as it was; deliver what is new under a new name"
    return "" if same else changed


def _folder_of(batch: Any) -> str:
    """The delivery that a batch was made from; empty, or no folder's name, for any other source."""
    source = str(batch.get("source", "")) if isinstance(batch, dict) else ""
    return source.partition("?")[0].rstrip("/")


def _new(delivered: _Delivered, batch: str, taken: dict[str, str], rules: str, found: FoundDeliveries) -> str:
    """Adds a delivery to those found ready, or returns the reason why not."""
    name = shown(delivered.folder)
    if not delivered.is_ready():
        return f"incomplete: it holds no {READY}"
    if not batch:
        return "its name cannot become that of a batch (a-z, 0-9, _ and -, up to 61 of them); rename the folder"
    if batch in taken:
        return f"its batch would be {batch}, as that of {taken[batch]}; rename the folder"
    taken[batch] = name
    now = delivered.listing()
    refused = delivered.memory.refused.get(name, {})
    if refused.get("rules") == rules and refused.get("listing") == now:
        return f"refused before: {'; '.join(refused['reasons'])}"
    content = delivered.digest()
    if refused.get("rules") == rules and refused.get("digest") == content:
        return f"refused before: {'; '.join(refused['reasons'])}"
    found.ready.append(Delivery(name, batch, delivered.memory.digests[name]["listing"], content))
    return ""
