"""The Dask side of parallel_map.py: the work travels by value, and every worker must write the same bytes."""

import importlib.metadata
import logging
import pickle
import platform
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from distributed import CancelledError, Client, KilledWorker, wait
from distributed.protocol.pickle import cloudpickle  # the one that Dask itself uses

from stages.data.parallel.parallel_map import KEPT, processor
from stages.runtime.command import StageError

logger = logging.getLogger(__name__)
P = TypeVar("P")
R = TypeVar("R")
PACKAGES = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")
"""They decide the bytes of a shard, so every worker must have the same versions."""
SECONDS_TO_CONNECT = 10
SECONDS_FOR_WORKERS = 30


def on_cluster(function: Callable[[P], R], items: Sequence[P], address: str, folder: Path) -> Iterator[R]:
    """As `parallel_map`, on the workers of the Dask scheduler at `address`."""
    try:
        client = Client(address, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        raise StageError(
            f"`shard.cluster`: no Dask scheduler answers at {address} ({error}). Start one with `dask scheduler`, or "
            "set it to null to use this machine's cores"
        ) from None
    probe = folder / "probe"
    token = uuid.uuid4().hex
    probe.write_text(token, encoding="utf-8")
    futures: list[Any] = []
    try:
        expected = _same_surroundings(client, address, probe, token)
        call = _by_value(_guarded(function, items, probe, expected))
        futures = client.map(call, range(len(items)), key=f"synset-{token}", pure=False)
        for result, wrong in _as_they_come(client, address, futures):
            if wrong:
                raise StageError(wrong)
            yield result
    except KilledWorker as error:
        raise StageError(f"{address}: several workers died at the same piece of work ({error}). {KEPT}") from None
    except (CancelledError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the work itself, as a full disk
        raise StageError(f"the Dask scheduler at {address} was lost. {KEPT}") from None
    finally:
        if client.status == "running":
            client.cancel(futures)
        client.close(timeout=SECONDS_TO_CONNECT)
        probe.unlink(missing_ok=True)


def _as_they_come(client: Any, address: str, futures: list[Any]) -> Iterator[Any]:
    waiting = set(futures)
    while waiting:
        try:
            done, waiting = wait(list(waiting), timeout=SECONDS_FOR_WORKERS, return_when="FIRST_COMPLETED")
        except TimeoutError:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                logger.warning("%s has no worker any more; waiting for one. Ctrl-C ends this; %s", address, KEPT)
            continue
        for future in done:
            yield future.result()


def _same_surroundings(client: Any, address: str, probe: Path, token: str) -> dict[str, str]:
    """What every worker reports of itself.

    Raises:
        StageError: there is no worker, or one sees other files, has other packages or another processor.
    """
    try:
        client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
    except TimeoutError:
        raise StageError(f"the Dask scheduler at {address} has no workers; start some with `dask worker`") from None
    here = platform.python_version_tuple()[:2]
    for worker, found in client.get_versions()["workers"].items():
        # This comes first: code of one Python cannot be read by another.
        if tuple(found["host"]["python"].split(".")[:2]) != here:
            raise StageError(f"Dask worker {worker} runs Python {found['host']['python']}, this is {'.'.join(here)}")
    found = client.run(_by_value(_surroundings), probe)
    first = next(iter(found.values()))
    expected = _surroundings(probe) | {"processor": first["processor"]}
    assert expected["probe"] == token
    for worker, what in found.items():
        if complaint := _complaint(worker, what, expected, probe):
            raise StageError(complaint)
    return expected


def _surroundings(probe: Path) -> dict[str, str]:
    """Everything that must be the same on all workers."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    seen = probe.read_text(encoding="utf-8") if probe.is_file() else ""
    return {**versions, "probe": seen, "processor": processor() if versions["opencv-python-headless"] != "none" else ""}


def _complaint(worker: str, found: Mapping[str, str], expected: Mapping[str, str], probe: Path) -> str:
    if found["probe"] != expected["probe"]:
        return (
            f"Dask worker {worker} does not see {probe}: every worker needs this checkout, on a shared file system, "
            "at the same path"
        )
    others = [f"{name} {found[name]} instead of {expected[name]}" for name in PACKAGES if found[name] != expected[name]]
    if others:
        return f"Dask worker {worker} would write other bytes: it has {', '.join(others)}; run `make setup` there"
    if found["processor"] != expected["processor"]:
        return (
            f"Dask worker {worker} has another kind of processor than the others ({found['processor']} instead of "
            f"{expected['processor']}), so bytes would depend on who writes a shard; use workers of one kind"
        )
    return ""


def _guarded(
    function: Callable[[P], R], items: Sequence[P], probe: Path, expected: dict[str, str]
) -> Callable[[int], tuple[R | None, str]]:
    """Result and error of an item; checks its surroundings, as a worker may have come later than the others."""

    def call(number: int) -> tuple[R | None, str]:
        if complaint := _complaint(platform.node(), _surroundings(probe), expected, probe):
            return None, complaint
        try:
            return function(items[number]), ""
        except StageError as error:
            return None, str(error)

    return call


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with all of this project's code that it calls: a worker that runs for weeks has no older one."""
    project = sys.modules["stages"]
    cloudpickle.register_pickle_by_value(project)
    try:
        code = cloudpickle.dumps(function)
    finally:
        cloudpickle.unregister_pickle_by_value(project)

    # It must not refer to a name of this project: Dask would send that by reference.
    def call(*arguments: Any) -> Any:
        return pickle.loads(code)(*arguments)

    return call
