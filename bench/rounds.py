"""Side-by-side measurement: candidates in turn, round after round, then a table with the ratios that a reader wants.

A bench builds one `Table` for each kind of data (`measured`) and ends with `report`, which prints the tables, writes
the JSON, and says which stated goals were missed. Machines drift (heat, neighbours), so candidates are interleaved, and
the one that goes first changes every round: what disturbs one of them disturbs the others as much.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

Role = Literal["ours", "peer", "limit"]
ROOT = Path(__file__).resolve().parents[1]


class PeerError(Exception):
    """A peer that cannot be measured here, with the reason: its row is left out, and goals that need it are missed."""


@dataclass(frozen=True)
class Candidate:
    """Something to be measured: `run` does one round and returns its figure, in the unit of the table."""

    name: str
    role: Role
    run: Callable[[], float]


@dataclass(frozen=True)
class Goal:
    """`ours` is at least `at_least` times as good as `over` (times as fast, or in a `1/at_least` of the time)."""

    ours: str
    over: str
    at_least: float


@dataclass(frozen=True)
class Bound:
    """The median of `name` itself is at least, or at most, so much, in the unit of the table."""

    name: str
    kind: Literal["at least", "at most"]
    value: float


@dataclass(frozen=True)
class Table:
    """What was measured on one kind of data."""

    title: str
    unit: str
    roles: Mapping[str, Role]
    figures: Mapping[str, Sequence[float]]
    """Of every round that counts, by name, as `roles` in the order of the rows."""
    goals: Sequence[Goal | Bound] = ()
    lower_is_better: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)
    """Candidates that could not be measured, with the reason."""

    def median(self, name: str) -> float:
        """Of a candidate's rounds."""
        return statistics.median(self.figures[name])

    def ratio(self, ours: str, over: str) -> float:
        """How many times as good the one's median is as the other's; above 1 `ours` is better."""
        return self.median(over) / self.median(ours) if self.lower_is_better else self.median(ours) / self.median(over)

    def named(self, *roles: Role) -> list[str]:
        """Candidates of these roles that were measured, in the order of the rows."""
        return [name for name, role in self.roles.items() if role in roles and name in self.figures]


def measure(candidates: Sequence[Candidate], rounds: int = 5) -> dict[str, list[float]]:
    """The figures of `rounds` rounds by name, after one round that does not count.

    Raises:
        ValueError: two candidates have the same name, or there are no rounds.
    """
    _check(candidates, rounds)
    for candidate in candidates:
        candidate.run()
    return _counted(candidates, rounds)


def _check(candidates: Sequence[Candidate], rounds: int) -> None:
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names) or rounds < 1:
        raise ValueError(f"{rounds} rounds of {names}: names must differ, and there must be a round")


def _counted(candidates: Sequence[Candidate], rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    turn = deque(candidates)
    for _ in range(rounds):
        for candidate in turn:
            figures[candidate.name].append(candidate.run())
        turn.rotate(-1)
    return figures


def measured(
    title: str,
    unit: str,
    candidates: Sequence[Candidate],
    goals: Sequence[Goal | Bound] = (),
    *,
    rounds: int = 5,
    lower_is_better: bool = False,
    missing: Mapping[str, str] | None = None,
) -> Table:
    """`measure` as a table. What raises `PeerError` in its first round is left out; `missing` names others, and why."""
    _check(candidates, rounds)
    missing, present = dict(missing or {}), []
    for candidate in candidates:
        try:
            candidate.run()
        except PeerError as error:
            missing[candidate.name] = str(error)
            print(f"{title}: goes on without {candidate.name}: {error}", flush=True)
        else:
            present.append(candidate)
    roles = {candidate.name: candidate.role for candidate in candidates}
    figures = _counted(present, rounds)
    return Table(title, unit, roles, figures, goals, lower_is_better, missing)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every bench takes: `--images`, `--rounds`, `--json`, `--check`; a bench adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=_folder, required=True, metavar="DIR", help="a folder with a folder of images a class"
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="that count, after one that does not (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes tables, versions and machine there too")
    parser.add_argument("--check", action="store_true", help="ends with 1 where a stated goal is missed")
    return parser


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of our own packages by name."""
    return {package: importlib.metadata.version(package) for package in packages}


def machine() -> dict[str, Any]:
    """The CPU's name, cores that this process may use, and the load of the last minute: call it before measuring."""
    names = [line for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    cpu = names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}


def report(
    tables: Sequence[Table],
    options: argparse.Namespace,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
) -> int:
    """Prints the tables, writes `options.json`, and as the last line prints the ratios; the exit code.

    Args:
        options: of `arguments`.
        machine: `machine()` from before the measurement.
        versions: of every package that took part, ours and the peers'.
    """
    for table in tables:
        print("\n".join(["", *lines(table)]))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"\n{machine['cpu']}, {machine['cores']} cores, load {machine['load']} at the start\n{named}\n")
    missed = [what for table in tables for what in misses(table)]
    last = "; ".join(summary(table) for table in tables)
    if options.json:
        content = {"tables": [as_json(table) for table in tables], "machine": dict(machine), "versions": dict(versions)}
        content |= {"missed": missed, "summary": last}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for what in missed:
        print(f"goal missed: {what}")
    print(last, flush=True)
    return int(options.check and bool(missed))


def lines(table: Table) -> list[str]:
    """The table for people: median, range and, for each of ours, how many times as good it is as the row."""
    ours = table.named("ours")
    width = max(map(len, [table.title, *table.roles]))
    columns = [max(len(f"× by {name}"), 8) for name in ours]
    head = f"{table.title:<{width}}  {table.unit:>12}  {'min – max':>21}"
    found = [head + "".join(f"  {f'× by {name}':>{size}}" for name, size in zip(ours, columns, strict=True))]
    for name in table.roles:
        if name not in table.figures:
            found.append(f"{name:<{width}}  not measured: {_reason(table, name)}")
            continue
        figures = table.figures[name]
        row = f"{name:<{width}}  {_figure(table.median(name)):>12}"
        row += f"  {_figure(min(figures)) + ' – ' + _figure(max(figures)):>21}"
        ratios = [f"{table.ratio(our, name):.2f}" if our != name else "" for our in ours]
        found.append((row + "".join(f"  {r:>{size}}" for r, size in zip(ratios, columns, strict=True))).rstrip())
    return found


def summary(table: Table) -> str:
    """Of the table, for the last line: each of ours over each peer and over the limit."""
    others = table.named("peer", "limit")
    missing = [f"no figure of {name}" for name in table.roles if name not in table.figures]
    parts = []
    for our in table.named("ours"):
        ratios = [
            f"{table.ratio(our, name):.2f} × {name}{' (the limit)' if table.roles[name] == 'limit' else ''}"
            for name in others
        ]
        parts.append(f"{our} is " + ", ".join(ratios or [f"{_figure(table.median(our))} {table.unit}"]))
    return f"{table.title}: " + ", ".join([*parts, *missing])


def misses(table: Table) -> list[str]:
    """A sentence for every goal of the table that is missed, one that could not be measured included."""
    return [said for goal in table.goals if (said := _miss(table, goal))]


def as_json(table: Table) -> dict[str, Any]:
    """The table as plain values, the figure of every round included."""
    rows = [
        {
            "name": name,
            "role": table.roles[name],
            "median": table.median(name),
            "min": min(figures),
            "max": max(figures),
            "figures": list(figures),
            "ratios": {our: table.ratio(our, name) for our in table.named("ours") if our != name},
        }
        for name, figures in table.figures.items()
    ]
    goals = [{**vars(goal), "met": _miss(table, goal) is None} for goal in table.goals]
    return {
        "title": table.title,
        "unit": table.unit,
        "lower_is_better": table.lower_is_better,
        "rows": rows,
        "missing": dict(table.missing),
        "goals": goals,
    }


class Peer:
    """A script of `bench/peers/`, alive in the peers' environment: it prepares its data once, then does a round a call.

    It starts with the first round, prints a line of JSON when it is ready (`{"versions": {...}}`), and one after every
    round. Use it as a context manager, so that it ends with the bench.
    """

    def __init__(self, script: str, *arguments: str | Path, environment: str = "bench") -> None:
        self.script, self.arguments, self.environment = script, arguments, environment
        self.versions: dict[str, str] = {}
        """Of its packages, known from the first round on."""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def go(self) -> dict[str, float]:
        """One round: what the script measured.

        Raises:
            PeerError: it has no environment here, or it ended; with its last words.
        """
        process = self._process or self._start()
        assert process.stdin
        # One that has ended is found out by `_line`, which says with which words.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("go\n")
            process.stdin.flush()
        return self._line(process)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            _end(self._process)
            self._words.close()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        from bench.environment import python

        command = [str(python(self.environment)), "-m", f"bench.peers.{self.script}", *map(str, self.arguments)]
        # Its words go to a file: a pipe that nobody reads would stop it. Its own session: its workers end with it.
        self._words: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.versions = self._line(self._process)["versions"]
        return self._process

    def _line(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout
        if line := process.stdout.readline():
            return dict(json.loads(line))
        code = process.wait()
        self._words.seek(0)
        words = "\n".join(self._words.read().strip().splitlines()[-15:])
        raise PeerError(f"bench/peers/{self.script}.py ended with {code}:\n{words}")


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                stream.close()


def _miss(table: Table, goal: Goal | Bound) -> str | None:
    names = (goal.ours, goal.over) if isinstance(goal, Goal) else (goal.name,)
    for name in names:
        if name not in table.figures:
            return f"{table.title}: {name} was not measured ({_reason(table, name)})"
    if isinstance(goal, Goal):
        ratio = table.ratio(goal.ours, goal.over)
        met, found = ratio >= goal.at_least, f"{ratio:.2f} × {goal.over}, not {goal.at_least:g} ×"
    else:
        median = table.median(goal.name)
        met = median >= goal.value if goal.kind == "at least" else median <= goal.value
        found = f"{_figure(median)} {table.unit}, not {goal.kind} {goal.value:g}"
    return None if met else f"{table.title}: {names[0]} is {found}"


def _reason(table: Table, name: str) -> str:
    """Why a candidate has no figures, on one line: of a program's last words the very last."""
    return table.missing.get(name, "no such candidate").strip().splitlines()[-1]


def _figure(value: float) -> str:
    """Three figures that count, and whole numbers above a hundred."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""  # not Linux: the platform's own name of the processor will do


def _folder(value: str) -> Path:
    path = Path(value).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{value} is no folder")
    return path


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number
