"""The same work on the cores of this machine, or on the workers of an existing Dask cluster (docs/scale-out.md)."""

import importlib.metadata
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from stages.runtime.command import StageError
from stages.runtime.progress import worker_count

logger = logging.getLogger(__name__)
P = TypeVar("P")
R = TypeVar("R")

# Of the packages that decide the bytes of a piece, and that a worker therefore has in the same version.
PACKAGES = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_CONNECT = 10
SECONDS_FOR_WORKERS = 30
KEPT = "What is finished is kept: run the same command again"


def spread(
    function: Callable[[P], R], pieces: Sequence[P], cluster: str | None, folder: Path
) -> Generator[R, None, None]:
    """Results of `function`, one for each piece, in the order in which they are ready.

    Closing the iterator, or an error, cancels what has not begun.

    Args:
        function: it travels to a cluster by value, with the project's code that it calls: the same runs there.
        pieces: small, as all are sent.
        cluster: address of a Dask scheduler; None: processes on this machine.
        folder: that all workers must see.

    Raises:
        StageError: of `function`; a process died; the cluster cannot be reached, or a worker would write other bytes.
    """
    if not pieces:
        return
    if cluster:
        yield from _on_cluster(function, pieces, cluster, folder)
    else:
        yield from _on_this_machine(function, pieces, min(worker_count(), len(pieces)))


def processor() -> str:
    """What of the processor decides the bytes of resized images: OpenCV chooses its code by it."""
    import cv2  # here, so that a worker without it is told so

    ipp = cv2.ipp.getIppVersion() if cv2.ipp.useIPP() else "without IPP"
    return f"{platform.machine()}; {cv2.getCPUFeaturesLine()}; {ipp}"


def _on_this_machine(function: Callable[[P], R], pieces: Sequence[P], workers: int) -> Iterator[R]:
    import cv2

    # A forked process waits for ever for threads that OpenCV had; with one it has none.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        for future in as_completed([pool.submit(function, piece) for piece in pieces]):
            yield future.result()
    except BrokenProcessPool:
        raise StageError(
            f"one of {workers} worker processes was killed; if memory ran out, set SYNSET_WORKERS to fewer. {KEPT}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(threads)


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot stop its workers, and they would wait for work for ever. Ctrl-C goes to all: the parent
    ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        # Its end closes no pipe: processes forked later hold them as well.
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_cluster(function: Callable[[P], R], pieces: Sequence[P], address: str, folder: Path) -> Iterator[R]:
    from distributed import CancelledError, Client, KilledWorker

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
        call = _by_value(_guarded(function, pieces, probe, expected))
        futures = client.map(call, range(len(pieces)), key=f"synset-{token}", pure=False)
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
    from distributed import wait

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
    """What every worker has found about itself.

    Raises:
        StageError: there is none, or one sees other files, has other packages or another processor.
    """
    try:
        client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
    except TimeoutError:
        raise StageError(f"the Dask scheduler at {address} has no workers; start some with `dask worker`") from None
    here = platform.python_version_tuple()[:2]
    for worker, found in client.get_versions()["workers"].items():
        # Said first: code of one Python cannot be read by another.
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
    """What must be the same wherever a piece is done."""
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
    function: Callable[[P], R], pieces: Sequence[P], probe: Path, expected: dict[str, str]
) -> Callable[[int], tuple[R | None, str]]:
    """Result and error of a piece; checks its surroundings, as a worker may have come later than the others."""

    def call(number: int) -> tuple[R | None, str]:
        if complaint := _complaint(platform.node(), _surroundings(probe), expected, probe):
            return None, complaint
        try:
            return function(pieces[number]), ""
        except StageError as error:
            return None, str(error)

    return call


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with all of this project's code that it calls: a worker that runs for weeks has no older one."""
    from distributed.protocol.pickle import cloudpickle  # the one that Dask itself uses

    project = sys.modules["stages"]
    cloudpickle.register_pickle_by_value(project)
    try:
        code = cloudpickle.dumps(function)
    finally:
        cloudpickle.unregister_pickle_by_value(project)

    # Without a name of this project in it, as Dask sends by reference what it can.
    def call(*arguments: Any) -> Any:
        import pickle

        return pickle.loads(code)(*arguments)

    return call
