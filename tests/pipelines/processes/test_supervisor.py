"""Children are kept running, and nothing is left of them."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.processes import supervisor
from pipelines.processes.servers import Service
from pipelines.processes.stage_process import Stop
from stages.runtime.command import StageError
from tests.workspace import is_at_work


def shell(name: str, script: str) -> Service:
    """A service of one line."""
    return Service(name, ["sh", "-c", script], grace=1.0)


def asked_when(condition: Callable[[], bool]) -> Stop:
    """A stop that is asked once the condition holds."""
    return Stop(also=condition, every=0)


class Clock:
    """A clock that stands still while nobody sleeps: what is late on a busy machine is not late here."""

    now = 0.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Lets as many seconds pass here, and a hundredth of one outside."""
        self.now += seconds
        time.sleep(0.01)


def test_a_child_that_ends_is_started_again_and_its_lines_carry_its_name(tmp_path: Path) -> None:
    lines: list[str] = []
    ends_once = shell(
        "server", f"echo up; test -e {tmp_path}/second && exec sleep 300; touch {tmp_path}/second; exit 7"
    )
    flows = shell("flows", "echo ready; exec sleep 300")
    stop = asked_when(lambda: lines.count("server   | up") == 2 and "flows    | ready" in lines)
    supervisor.keep_running([ends_once], flows, stop, lines.append)
    assert "schedule | server ended with exit code 7; starting it again in 1 s" in lines


def test_a_server_that_hangs_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(supervisor, "ASK_EVERY", 0.1)
    monkeypatch.setattr(supervisor, "HANGS", 0.5)
    monkeypatch.setattr(supervisor, "START_WITHIN", math.inf)
    monkeypatch.setattr(supervisor, "time", Clock())
    # One answer that is missing is no reason; from the fourth on none comes.
    said = iter([True, False, True])
    monkeypatch.setattr(supervisor, "answers", lambda _: next(said, lines.count("server   | up") == 2))
    server = Service("server", ["sh", "-c", "echo up; exec sleep 300"], health="http://there", grace=1.0)
    stop = asked_when(lambda: lines.count("server   | up") == 2)
    supervisor.keep_running([server], shell("flows", "exec sleep 300"), stop, lines.append)
    assert lines.count("schedule | server did not answer in time; starting it again in 1 s") == 1


def test_who_keeps_ending_is_given_up_and_the_others_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "TRIES", 2)
    other = shell("other", f"echo $$ > {tmp_path}/pid; exec sleep 300")
    server = shell("server", f"until test -s {tmp_path}/pid; do sleep 0.05; done; echo no such thing; exit 3")
    with pytest.raises(StageError, match=r"server ended with exit code 3, 2 times in a row(.|\n)*no such thing"):
        supervisor.keep_running([other, server], other, Stop(), print)
    assert not is_at_work(int((tmp_path / "pid").read_text()))


def test_a_stop_leaves_nothing_of_the_groups(tmp_path: Path) -> None:
    deaf = f"sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/deaf; while :; do sleep 0.1; done' & wait"
    stop = asked_when(lambda: (tmp_path / "deaf").exists() and bool((tmp_path / "deaf").read_text().strip()))
    supervisor.keep_running([], shell("flows", deaf), stop, print)
    assert not is_at_work(int((tmp_path / "deaf").read_text()))
