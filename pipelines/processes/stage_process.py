"""A stage as a process group: its output line by line while it runs, nothing of it left over when it ends."""

import codecs
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from stages.runtime.processes import end_group

logger = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL: enough for a stage to remove what it had begun."""
_POLL = 0.1


class Stop:
    """Whether the flow is to stop: because of a signal, or because `also` returned True.

    Args:
        also: another reason to stop. If it raises, that is logged once, and it is called again later: a training must
            not end because the server that it asks is gone.
        every: seconds between two calls of `also`.
    """

    def __init__(self, also: Callable[[], bool] | None = None, every: float = 5.0) -> None:
        self._also, self._every = also, every
        self._checked = time.monotonic()
        self._failed = False
        self.reason: str | None = None

    def requested(self) -> bool:
        """True from the first request on."""
        if self.reason is None and self._also and time.monotonic() - self._checked >= self._every:
            if self._check(self._also):
                self.reason = "cancelled in Prefect"
            self._checked = time.monotonic()
        return self.reason is not None

    def _check(self, also: Callable[[], bool]) -> bool:
        try:
            return also()
        except Exception as error:
            if not self._failed:
                logger.warning("warning: cannot see whether to stop (%s: %s); going on", type(error).__name__, error)
            self._failed = True
            return False

    def on_signal(self, number: int, _frame: object) -> None:
        """The first signal asks to stop; a second one raises KeyboardInterrupt at once."""
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = f"stopped by {signal.Signals(number).name}"


@contextmanager
def signals_to(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM go to `stop` while this is open; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_streamed(
    command: Sequence[str],
    on_line: Callable[[str], None],
    stop: Stop,
    grace: float = GRACE,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> int:
    """Runs `command` in a process group of its own, calls `on_line` (in another thread) with each line of its output.

    Args:
        cwd: where it runs; default: here.
        env: its whole environment; default: this process's.
        pass_fds: descriptors of open files that it inherits.

    Returns:
        Its exit code, negative for a signal. When it has ended, or `stop` is requested, the rest of its group gets
        SIGTERM, and SIGKILL `grace` seconds later, or at once with a second signal.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=cwd,
        env={**(os.environ if env is None else env), "PYTHONUNBUFFERED": "1"},
        pass_fds=pass_fds,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=pass_lines_on, args=(process.stdout, on_line), daemon=True)
    reader.start()
    try:
        while process.poll() is None and not stop.requested():
            time.sleep(_POLL)
        end_group(process.pid, process.poll, grace)
    except BaseException:  # the second signal, most likely
        end_group(process.pid, process.poll, grace=0)
        raise
    finally:
        reader.join(timeout=5)
    return process.wait()


def pass_lines_on(stream: IO[bytes], on_line: Callable[[str], None]) -> None:
    """Calls `on_line` with each line of a process's output as soon as it is there, until the end."""
    with stream:
        for line in split_lines(iter(lambda: os.read(stream.fileno(), 65536), b"")):
            on_line(line)


def split_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines as a terminal finally shows them: a progress bar that redraws itself gives only its last state."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + decode(chunk)).replace("\r\n", "\n").split("\n")
        yield from filter(None, map(_last_state, whole))
        # A bar without an end of line must not grow without bound.
        if rest.endswith("\r"):
            rest = _last_state(rest) + "\r"
    if last := _last_state(rest):
        yield last


def _last_state(line: str) -> str:
    states = [state.rstrip() for state in line.split("\r")]
    return next((state for state in reversed(states) if state), "")
