"""How a process group ends: asked first, killed after its grace, nothing left."""

import os
import subprocess
import sys

import psutil
import pytest

from stages.runtime.processes import end_group, end_processes, group_lives

STUBBORN = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); sys.stdin.read()"
)
POLITE = "import sys; print('ready', flush=True); sys.stdin.read()"
# Ends at SIGTERM, and leaves a child that ignores it.
LEADER = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdin=subprocess.PIPE)
child.wait()
"""


def start(code: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("code", "exit_code"), [(POLITE, -15), (STUBBORN, -9), (LEADER, -15)])
@pytest.mark.parametrize("leader_grace", [0.0, 0.2])
def test_a_group_ends_with_all_that_are_in_it(code: str, exit_code: int, leader_grace: float) -> None:
    process = start(code)
    end_group(process.pid, process.poll, grace=0.2, leader_grace=leader_grace)
    assert process.returncode == exit_code
    assert not group_lives(process.pid)


def test_without_grace_it_is_killed_at_once() -> None:
    process = start(POLITE)
    end_group(process.pid, process.poll, grace=0)
    assert process.returncode == -9


def test_processes_of_several_groups() -> None:
    processes = [psutil.Process(start(code).pid) for code in (POLITE, STUBBORN)]
    end_processes(processes, grace=0.2)
    assert [each.wait() for each in processes] == [-15, -9]


def test_a_zombie_keeps_no_group_alive() -> None:
    """In a container nobody may ever reap it."""
    process = subprocess.Popen(["true"], start_new_session=True)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
    assert not group_lives(process.pid)
    process.wait()
