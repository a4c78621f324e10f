"""One at a time: also after a kill, of which nothing is left."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from pipelines.processes import flow_lock as module
from pipelines.processes.flow_lock import MARK, BusyError, clear_after_kill, exclusive, folder
from stages.runtime import locks
from tests.prefect_api import prefect_api, python

ROOT = Path(__file__).resolve().parents[3]
# It starts a stage in a session of its own, as flows do, and one that is deaf to SIGTERM.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from pipelines.processes.flow_lock import exclusive
root = Path(sys.argv[1])
with exclusive("work", root=root):
    for script in ("sleep 300", "trap '' TERM; while :; do sleep 0.1; done"):
        child = subprocess.Popen(["sh", "-c", script], start_new_session=True)
        print(child.pid, flush=True)
    time.sleep(300)
"""


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that holds the lock of `work` in tmp_path, and those that it started."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(process.stdout.readline()) for _ in range(2)]
    yield process, children
    for pid in [process.pid, *children]:
        if lives(pid):
            os.kill(pid, 9)
    process.wait()


def test_a_second_holder_is_refused_and_told_by_whom(holder: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, children = holder
    root = Path(process.args[-1])  # type: ignore[index, arg-type]
    with pytest.raises(BusyError, match=f"process {process.pid}"), exclusive("work", root=root):
        pass
    clear_after_kill("work", root)
    assert all(map(lives, [process.pid, *children]))  # nothing of a living holder is cleared away
    with exclusive("other", root=root):
        pass


def test_who_has_the_lock_for_a_moment_only_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with exclusive("work", root=tmp_path):
        pass
    with (folder("work", tmp_path) / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(locks.time, "sleep", lambda _: fcntl.flock(file, fcntl.LOCK_UN))  # while it waits
        with exclusive("work", root=tmp_path):
            pass


def test_after_a_kill_the_next_ends_what_was_left(
    holder: tuple[subprocess.Popen[str], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.5)
    process, children = holder
    process.kill()
    process.wait()
    assert all(map(lives, children))
    with exclusive("work", root=tmp_path):
        assert not any(map(lives, children))


def test_what_does_not_show_its_environment_at_first_is_found_all_the_same(
    holder: tuple[subprocess.Popen[str], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, children = holder
    process.kill()
    process.wait()
    has_mark, hidden = module._has_mark, {children[1]}

    def late(candidate: psutil.Process, mark: str) -> bool:
        if candidate.pid in hidden:
            hidden.remove(candidate.pid)
            return False
        return has_mark(candidate, mark)

    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(module, "_has_mark", late)
    with exclusive("work", root=tmp_path):
        assert not any(map(lives, children))


def test_the_lock_is_given_back_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive("work", root=tmp_path):
        assert os.environ[MARK] == f"work:{tmp_path}"
        with exclusive("inner", root=tmp_path):
            assert os.environ[MARK] == f"inner:{tmp_path}"
        raise ZeroDivisionError
    assert MARK not in os.environ
    with exclusive("work", root=tmp_path):
        pass


def test_the_lock_is_taken_for_clearing_up_only_where_there_is_something_to_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes while reconcile looks, once a minute, would be told that another one is at work, and end."""
    taken: list[str] = []
    take = module._take

    def noted(file: IO[bytes], name: str, patience: float) -> None:
        taken.append(name)
        take(file, name, patience)

    monkeypatch.setattr(module, "_take", noted)
    with exclusive("work", "a-run", root=tmp_path):
        pass
    clear_after_kill("work", tmp_path)
    assert taken == ["work"]
    path = folder("work", tmp_path) / "lock"
    for content in ({"pid": 999_999_999, "runs": []}, {"pid": None, "runs": [["a-run", 999_999_999, 1.0]]}):
        taken.clear()
        path.write_text(json.dumps(content))
        clear_after_kill("work", tmp_path)
        assert taken == ["work"]


@pytest.mark.parametrize("content", ["", "{", "[]", "rubbish\n"])
def test_whatever_a_kill_left_in_the_file_is_read(tmp_path: Path, content: str) -> None:
    folder("work", tmp_path).mkdir(parents=True)
    (folder("work", tmp_path) / "lock").write_text(content)
    with exclusive("work", root=tmp_path):
        pass


def test_a_kill_between_writing_and_cutting_off_loses_nothing(tmp_path: Path) -> None:
    path = folder("work", tmp_path) / "lock"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"pid": 1, "runs": [["a-run", 999_999_999, 1.0]]}) + '\n"rest of a longer line"]}\n')
    with exclusive("work", root=tmp_path):  # Prefect is not in reach: the run is kept for who reaches it
        pass
    assert [run[0] for run in json.loads(path.read_text())["runs"]] == ["a-run"]


FLOW = """
import sys, time
from pathlib import Path
from prefect import flow, runtime
from pipelines.processes.flow_lock import exclusive
@flow
def work():
    with exclusive("work", str(runtime.flow_run.id), root=Path(sys.argv[1])):
        print("id", runtime.flow_run.id, flush=True)
        time.sleep(300 if sys.argv[2] == "long" else 0)
work()
"""
CLEAR = """
import sys
from pathlib import Path
from pipelines.processes.flow_lock import clear_after_kill
clear_after_kill("work", Path(sys.argv[1]))
"""
STATE = """
import sys
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(client.read_flow_run(sys.argv[1]).state.name)
"""


@pytest.mark.slow
def test_the_run_of_a_killed_flow_is_marked_as_crashed(tmp_path: Path) -> None:
    with prefect_api(tmp_path, 4700) as environment:
        command = [sys.executable, "-c", FLOW, str(tmp_path), "long"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        killed = process.stdout.readline().split()[1]
        process.kill()
        process.wait()
        assert python(STATE, environment, killed).strip() == "Running"  # Prefect does not see it

        nobody_there = environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
        python(CLEAR, nobody_there, str(tmp_path))
        assert python(STATE, environment, killed).strip() == "Running"
        python(CLEAR, environment, str(tmp_path))
        assert python(STATE, environment, killed).strip() == "Crashed"

        whole = python(FLOW, environment, str(tmp_path), "short").split()[1]
        python(CLEAR, environment, str(tmp_path))
        assert python(STATE, environment, whole).strip() == "Completed"
