"""Keeps the servers and the flows' process running: what ends or hangs is started again; a stop leaves nothing."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from subprocess import PIPE, Popen

from pipelines.processes.flow_lock import at_work, clear_after_kill
from pipelines.processes.servers import START_WITHIN, Service, answers, start, stop
from pipelines.processes.stage_process import Stop, pass_lines_on
from stages.runtime.command import StageError

FLOWS = ("retrain", "reconcile", "verify")
"""The flows that are served, by the names of their locks."""
QUICK = 60.0
"""A child that ends within these seconds of its start has ended quickly."""
ASK_EVERY = 10.0
"""Seconds between two health checks of a server that is ready."""
HANGS = 300.0
"""Seconds without an answer, after which a server that does not end is started again. A busy one may miss some."""
TRIES = 5
"""Quick ends in a row, after which a child is not started again."""
Log = Callable[[str], None]
"""Takes a line of output."""


@dataclass
class Child:
    """A service and the process that runs it now."""

    service: Service
    process: Popen[bytes] | None = None
    started: float = 0.0
    quick_ends: int = 0
    start_after: float = 0.0
    ready: bool = False
    answered: float = 0.0
    """When it last answered, or was started."""
    ask_after: float = 0.0
    last_lines: list[str] = field(default_factory=list)

    def start(self, log: Log) -> None:
        """Starts it; its lines go to `log`, each after its name."""
        self.process = start(self.service, PIPE)
        self.started = self.answered = self.ask_after = time.monotonic()
        self.ready = not self.service.health
        self.last_lines.clear()
        assert self.process.stdout is not None
        on_line = partial(self._log_line, log=log)
        threading.Thread(target=pass_lines_on, args=(self.process.stdout, on_line), daemon=True).start()

    def check(self, log: Log) -> None:
        """Starts it when it is due, and checks whether it is ready, has ended or hangs.

        Raises:
            StageError: it keeps ending soon after its start.
        """
        if self.process is None:
            if time.monotonic() >= self.start_after:
                self.start(log)
        elif self.process.poll() is not None:
            self._ended(self.process, log)
        elif self.service.health and time.monotonic() >= self.ask_after:
            if answers(self.service.health):
                self.ready, self.answered = True, time.monotonic()
            elif time.monotonic() - self.answered > (HANGS if self.ready else START_WITHIN):
                self._ended(self.process, log)
            if self.ready:
                self.ask_after = time.monotonic() + ASK_EVERY

    def stop(self, at_once: bool = False) -> None:
        """Ends it, with all that it started."""
        if self.process is not None:
            stop(self.process, 0.0 if at_once else self.service.grace)
            self.process = None

    def _ended(self, process: Popen[bytes], log: Log) -> None:
        how = "did not answer in time" if process.poll() is None else f"ended with exit code {process.returncode}"
        quick = not self.ready or time.monotonic() - self.started < QUICK
        self.quick_ends = self.quick_ends + 1 if quick else 1
        self.stop()  # what is left of its group
        name = self.service.name
        if self.quick_ends >= TRIES:
            last = "\n".join(self.last_lines)
            raise StageError(f"{name} {how}, {TRIES} times in a row, soon after its start; its last words:\n{last}")
        pause = 2.0 ** (self.quick_ends - 1)
        self.start_after = time.monotonic() + pause
        log(f"schedule | {name} {how}; starting it again in {pause:.0f} s")

    def _log_line(self, line: str, log: Log) -> None:
        self.last_lines[:] = [*self.last_lines[-9:], line]
        log(f"{self.service.name:8} | {line}")


def keep_running(servers: Sequence[Service], flows: Service, stop: Stop, log: Log) -> None:
    """Runs the servers, and the flows once all servers have answered, until asked to stop.

    Raises:
        StageError: one of them keeps ending soon after its start. The others are stopped.
    """
    children = [Child(service) for service in servers]
    last = Child(flows)
    try:
        while not stop.requested():
            for child in children:
                child.check(log)
            # Not started again while a server is down: it could only fail.
            all_there = all(child.ready and child.process for child in children)
            if last.process is not None or all_there:
                last.check(log)
            # After a while without a server, Prefect's runner starts flows again, but hears of no Cancel button.
            if all_there and last.process and last.started < max((child.started for child in children), default=0):
                _renew(last, log)
            time.sleep(0.2)
        log("schedule | stopping: first the flows, then the servers (again: at once)")
        last.stop()
        clear_up()  # while Prefect can still be told
        for child in children:
            child.stop()
    finally:  # an error, or the second signal
        for child in [last, *children]:
            child.stop(at_once=True)


def _renew(flows: Child, log: Log) -> None:
    """Ends the flows' process, which is then started again, unless a flow is at work just now."""
    if not any(map(at_work, FLOWS)):
        log("schedule | a server was started again: so are the flows")
        flows.stop()


def clear_up() -> None:
    """Ends what killed flows left behind, and tells Prefect."""
    for name in FLOWS:
        clear_after_kill(name)
