"""A stage's processes: streamed, and none left over."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.processes.stage_process import Stop, run_streamed, split_lines
from tests.workspace import text_of, until

ROOT = Path(__file__).resolve().parents[3]


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_comes_line_by_line_while_the_command_runs(tmp_path: Path) -> None:
    arrived: list[str] = []
    os.mkfifo(tmp_path / "go")

    def take(line: str) -> None:
        arrived.append(line)
        if line == "one":
            (tmp_path / "go").write_text("go\n")  # the command waits for it, so this line came before its end

    assert run_streamed(["sh", "-c", f"echo one; read go < {tmp_path}/go; echo two >&2; exit 3"], take, Stop()) == 3
    assert arrived == ["one", "two"]


def test_of_a_progress_bar_only_the_last_state_is_a_line() -> None:
    bar = [b"scan 10 %\rscan 5", b"0 %\rscan 100 %\nnext\r\n", b"\rhalf \xc3", b"\xa9\r\r"]
    assert list(split_lines(bar)) == ["scan 100 %", "next", "half é"]
    assert list(split_lines([b"50 %\r", b" \r", b"\n"])) == ["50 %"]


def test_what_a_command_leaves_running_ends_with_it() -> None:
    lines: list[str] = []
    assert run_streamed(["sh", "-c", "sleep 300 & echo $!"], lines.append, Stop()) == 0
    assert not lives(int(lines[0]))


def test_a_stop_ends_the_whole_group_also_what_ignores_sigterm(tmp_path: Path) -> None:
    script = f"sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/deaf; while :; do sleep 0.1; done' & wait"
    stop = Stop(also=lambda: (tmp_path / "deaf").exists() and bool((tmp_path / "deaf").read_text().strip()), every=0)
    assert run_streamed(["sh", "-c", script], lambda line: None, stop, grace=0.5) == -signal.SIGTERM
    assert stop.reason == "cancelled in Prefect"
    assert not lives(int((tmp_path / "deaf").read_text()))


def test_a_stop_that_cannot_be_looked_for_is_said_once_and_looked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looks = []

    def unreachable() -> bool:
        looks.append(1)
        if len(looks) == 3:
            (tmp_path / "enough").touch()
        raise ConnectionError("refused")

    stop = Stop(also=unreachable, every=0)
    assert (
        run_streamed(
            ["sh", "-c", f"until test -e {tmp_path}/enough; do sleep 0.05; done; exit 7"], lambda line: None, stop
        )
        == 7
    )
    assert len(looks) >= 3
    assert stop.reason is None
    assert len(caplog.messages) == 1
    assert "refused" in caplog.text


def test_a_second_ctrl_c_does_not_wait_for_what_ignores_the_first(tmp_path: Path) -> None:
    deaf = f"trap 'touch {tmp_path}/asked' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done"
    code = (
        "from pipelines.processes.stage_process import *\nstop = Stop()\n"
        f"with signals_to(stop):\n    run_streamed(['sh', '-c', {deaf!r}], print, stop, grace=300)"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    pid = int(text_of(tmp_path / "pid", flow))
    flow.send_signal(signal.SIGINT)
    until((tmp_path / "asked").exists, flow)
    assert lives(pid)
    flow.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in flow.communicate()[1]
    assert not lives(pid)


def test_sigterm_to_the_flow_stops_the_stage(tmp_path: Path) -> None:
    code = (
        "from pipelines.processes.stage_process import *\nstop = Stop()\n"
        "with signals_to(stop):\n"
        f"    run_streamed(['sh', '-c', 'sleep 300 & echo $! > {tmp_path}/pid; wait'], print, stop)\n"
        "print(stop.reason)"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    grandchild = int(text_of(tmp_path / "pid", flow))
    assert lives(grandchild)
    flow.send_signal(signal.SIGTERM)
    assert flow.communicate()[0] == "stopped by SIGTERM\n"
    assert not lives(grandchild)
