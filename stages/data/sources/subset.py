"""Which images of a source are taken: some classes, some images of each, with or without labels."""

import hashlib
import heapq
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from stages.data.sources.parts import Image, LeftOut, Name, Noted, Part
from stages.data.sources.uri import SourceUri
from stages.runtime.command import StageError
from stages.runtime.progress import worker_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which images are taken. It is decided by a hash of each name, so it does not depend on what else there is.

    `limits` has, for each split and class, the highest rank that is taken.
    """

    seed: int = 0
    classes: frozenset[str] | None = None
    limits: dict[tuple[str, str], bytes] | None = None
    unlabelled: bool = False
    labelled_only: bool = False

    @property
    def listing(self) -> str:
        """All that decides which images are taken, as text that is the same in every process."""
        limits = sorted((*key, limit.hex()) for key, limit in (self.limits or {}).items())
        classes = None if self.classes is None else sorted(self.classes)
        return repr((self.seed, classes, self.limits is None, limits, self.unlabelled, self.labelled_only))

    def takes(self, image: Image | Name | LeftOut | Noted) -> bool:
        """Whether this one is; what is no image is not."""
        if not isinstance(image, (Image, Name)):
            return False
        if self.labelled_only and not image.class_name:
            return False
        if self.classes is not None and image.class_name not in self.classes:
            return False
        limits = self.limits
        return limits is None or rank(self.seed, image.name) <= limits.get((image.split, image.class_name), b"")


@dataclass
class Ranks:
    """Collects the `count` lowest ranks of each class in each split; it keeps only those in memory."""

    seed: int
    count: int | None
    lowest: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def see(self, name: Name) -> None:
        """Takes one name in."""
        heap = self.lowest.setdefault((name.split, name.class_name), [])
        if self.count is not None:
            self._keep(heap, -int.from_bytes(rank(self.seed, name.name), "big"))

    def join(self, other: "Ranks") -> None:
        """Takes in what another part saw."""
        for key, heap in other.lowest.items():
            own = self.lowest.setdefault(key, [])
            for each in heap:
                self._keep(own, each)

    def limits(self) -> dict[tuple[str, str], bytes]:
        """The highest rank that is taken, of each class in each split."""
        return {key: (-heap[0]).to_bytes(32, "big") for key, heap in self.lowest.items() if heap}

    def _keep(self, heap: list[int], item: int) -> None:
        if len(heap) < (self.count or 0):
            heapq.heappush(heap, item)
        elif heap:
            heapq.heappushpop(heap, item)


def rank(seed: int, name: str) -> bytes:
    """A sort key of a name, in an order that the seed draws."""
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def choose(uri: SourceUri, parts: list[Part], incoming: Path | str) -> tuple[list[Part], Choice]:
    """The subset that the query of `uri` asks for: the parts with images of it, and which of their images are taken.

    Raises:
        StageError: a class that is asked for is not there, or a value of the query makes no sense.
    """
    seed, classes = uri.number("seed", 0) or 0, uri.classes(incoming)
    count, per_class = uri.number("num_classes", 1), uri.number("images_per_class", 1)
    known = None
    if all(part.whole_class for part in parts):
        known = {part.whole_class[1] for part in parts if part.whole_class}
    unlabelled = uri.unlabelled()
    choice = Choice(seed, classes, None, unlabelled == "true", unlabelled == "skip")
    ranks: Ranks | None = None
    if per_class is not None or (count is not None and known is None):
        ranks = _listing_pass(uri, parts, seed, per_class)
        known = {class_name for _, class_name in ranks.lowest if class_name}
    if known is not None:
        check_classes(uri.text, choice, known)
    if count is not None and known is not None:
        choice = replace(choice, classes=frozenset(sorted(classes or known, key=partial(rank, seed))[:count]))
    if per_class is not None and ranks is not None:
        choice = replace(choice, limits=ranks.limits())
    taken = choice.classes
    if taken is not None:
        parts = [part for part in parts if part.whole_class is None or part.whole_class[1] in taken]
    return parts, choice


def check_classes(source: str, choice: Choice, found: Iterable[str]) -> None:
    """Compares the classes that were asked for with those that the source turned out to have.

    Raises:
        StageError: one is not there.
    """
    available = set(found) - {""}
    if missing := (choice.classes or frozenset()) - available:
        raise StageError(
            f"source {source}: the source has no class {', '.join(sorted(missing))} (it has {len(available)} classes)"
        )


def _listing_pass(uri: SourceUri, parts: list[Part], seed: int, per_class: int | None) -> Ranks:
    if not all(part.whole_class for part in parts):
        logger.info("%s: reading the names of everything first, to choose from them", uri.text)
    all_ranks = Ranks(seed, per_class)
    with ThreadPoolExecutor(worker_count()) as pool:
        for found in pool.map(partial(_ranks, seed=seed, count=per_class), parts):
            all_ranks.join(found)
    return all_ranks


def _ranks(part: Part, seed: int, count: int | None) -> Ranks:
    found = Ranks(seed, count)
    for name in part.names():
        if isinstance(name, Name):
            found.see(name)
    return found
