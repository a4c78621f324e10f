"""A stage's processes: streamed, and none left over."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.processes.stage_process import Stop, run_streamed, split_lines

ROOT = Path(__file__).resolve().parents[3]


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> str:
    """The file's text, once there is one."""
    for _ in range(3600):
        if path.exists() and (text := path.read_text().strip()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written within three minutes")


def test_output_comes_line_by_line_while_the_command_runs() -> None:
    arrived: list[tuple[str, float]] = []
    code = run_streamed(
        ["sh", "-c", "echo one; sleep 1; echo two >&2; exit 3"],
        lambda line: arrived.append((line, time.monotonic())),
        Stop(),
    )
    assert code == 3
    assert [line for line, _ in arrived] == ["one", "two"]
    assert arrived[1][1] - arrived[0][1] > 0.5


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
    stop = Stop(also=lambda: (tmp_path / "deaf").exists(), every=0)
    assert run_streamed(["sh", "-c", script], lambda line: None, stop, grace=0.5) == -signal.SIGTERM
    assert stop.reason == "cancelled in Prefect"
    assert not lives(int(wait_for(tmp_path / "deaf")))


def test_a_stop_that_cannot_be_looked_for_is_said_once_and_looked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    looks = []

    def unreachable() -> bool:
        looks.append(1)
        raise ConnectionError("refused")

    stop = Stop(also=unreachable, every=0)
    assert run_streamed(["sh", "-c", "sleep 0.5; exit 7"], lambda line: None, stop) == 7
    assert len(looks) > 1
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
    pid = int(wait_for(tmp_path / "pid"))
    flow.send_signal(signal.SIGINT)
    for _ in range(200):
        if (tmp_path / "asked").exists():
            break
        time.sleep(0.05)
    assert lives(pid)
    flow.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in flow.communicate(timeout=30)[1]
    assert not lives(pid)


def test_sigterm_to_the_flow_stops_the_stage(tmp_path: Path) -> None:
    code = (
        "from pipelines.processes.stage_process import *\nstop = Stop()\n"
        "with signals_to(stop):\n"
        f"    run_streamed(['sh', '-c', 'sleep 300 & echo $! > {tmp_path}/pid; wait'], print, stop)\n"
        "print(stop.reason)"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    grandchild = int(wait_for(tmp_path / "pid"))
    assert lives(grandchild)
    flow.send_signal(signal.SIGTERM)
    assert flow.communicate(timeout=30)[0] == "stopped by SIGTERM\n"
    assert not lives(grandchild)
