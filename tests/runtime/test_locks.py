"""Locks between processes: who waits, who is refused, and that a kill releases."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stages.runtime import locks
from stages.runtime.locks import lock, locked_folder

HOLDER = """
import os, sys
from pathlib import Path
from stages.runtime.locks import locked_folder
with locked_folder(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        sys.stdin.read()
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_a_second_holder_is_refused_or_waits(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("of the last holder", encoding="utf-8")
    with path.open("r+") as first, path.open("r+") as second:
        assert lock(first)
        assert not lock(second, patience=0)
        assert not lock(second, patience=0.01)
        taken = threading.Event()

        def wait() -> None:
            lock(second)
            taken.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not taken.is_set()
        first.close()
        thread.join()
        assert taken.is_set()
    assert path.read_text(encoding="utf-8") == "of the last holder"


def test_the_kernel_releases_it_with_the_last_process_that_inherited_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        child = int(holder.stdout.readline())
        folder = os.open(tmp_path, os.O_RDONLY)
        holder.send_signal(signal.SIGKILL)
        assert not lock(folder, patience=0), "the child of the killed process holds it"
        holder.stdin.close()  # which ends the child
        assert lock(folder, patience=30), f"process {child} has ended"
        os.close(folder)
    waited: list[str] = []
    with locked_folder(tmp_path, on_wait=lambda: waited.append("waited")):
        pass
    assert waited == []
    assert list(tmp_path.iterdir()) == []


def test_who_has_to_wait_is_told_once(tmp_path: Path) -> None:
    inside = threading.Event()
    other = os.open(tmp_path, os.O_RDONLY)
    assert lock(other)

    def enter() -> None:
        with locked_folder(tmp_path, on_wait=lambda: os.close(other)):
            inside.set()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside.is_set()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks, "lock_descriptor", no_locks)
    with locked_folder(tmp_path, optional=True):
        pass
    with pytest.raises(OSError, match="no locks"), locked_folder(tmp_path):
        pass
