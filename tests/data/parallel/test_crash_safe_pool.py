"""Processes that may die: it is told of which task, at which position and by which signal, and the rest goes on."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from stages.data.parallel.crash_safe_pool import MOST_MEMORY, Death, Report, alone, run_tasks
from tests.workspace import ROOT


def double(task: int, report: Report) -> int:
    """Dies at 13 and at 14, and cannot do 15."""
    report(task * 100)
    if task in (13, 14):
        faulthandler.disable()  # pytest's, which would write a page
        os.kill(os.getpid(), signal.SIGSEGV if task == 13 else signal.SIGKILL)
    if task == 15:
        raise OSError(28, "No space left on device", "somewhere")
    if task == 16:
        return len(bytearray(MOST_MEMORY + 2**30))
    return 2 * task


@pytest.mark.parametrize("workers", [1, 3])
def test_a_death_costs_its_task_only(workers: int) -> None:
    found = dict(run_tasks(double, deque([1, 13, 2, 14, 3, 4]), workers))
    assert found[13] == Death(-signal.SIGSEGV, 1300)
    assert found[14] == Death(-signal.SIGKILL, 1400)
    assert {task: found[task] for task in (1, 2, 3, 4)} == {1: 2, 2: 4, 3: 6, 4: 8}


def test_tasks_may_be_added_while_it_runs() -> None:
    tasks = deque([1])
    found = []
    for task, result in run_tasks(double, tasks, 2):
        found.append(result)
        if task < 5:
            tasks.append(task + 1)
    assert found == [2, 4, 6, 8, 10]


def test_an_error_is_raised_here_and_ends_all_processes() -> None:
    with pytest.raises(OSError, match="No space left") as error:
        list(run_tasks(double, deque([1, 15, 2]), 2))
    assert (error.value.errno, error.value.filename) == (28, "somewhere")
    assert "in double" in "".join(error.value.__notes__)
    assert not psutil.Process().children()


def test_a_process_cannot_take_all_memory() -> None:
    with pytest.raises(MemoryError):
        list(run_tasks(double, deque([16]), 1))


def test_closing_ends_all_processes() -> None:
    with closing(run_tasks(double, deque(range(10)), 3)) as results:
        next(results)
        assert len(psutil.Process().children()) == 3
    assert not psutil.Process().children()


ENDLESS = """
import sys, time
from collections import deque
from contextlib import closing
from pathlib import Path
from stages.data.parallel.crash_safe_pool import alone, run_tasks

def work(task, report):
    while task:
        print("working", flush=True)
        report(0)
        time.sleep(0.05)

with alone(Path(sys.argv[1])):
    list(run_tasks(work, deque([0, 1, 0, 0]), 3))
"""


def test_processes_end_when_their_parent_is_killed_and_the_next_run_waits_for_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout
    assert parent.stdout.readline() == b"working\n"
    children = psutil.Process(parent.pid).children()
    assert len(children) == 3
    parent.kill()
    parent.wait()
    with alone(tmp_path):
        # Held by all three: having it means that they are at their end, those without a task included.
        while [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]:
            time.sleep(0.01)
    parent.stdout.close()
