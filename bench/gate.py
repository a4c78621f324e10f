"""How often does the gate err? Draws pairs of models whose errors are correlated as real ones' are, and judges them.

    python -m bench.gate --check

A retrained model answers 8 to 16 % of the images differently right, most of its errors are the other's too. Each draw
is of two such models on new images; `judge` sees what it sees in earnest: answers, classes, batches of fresh images.
With --check it ends with 1 where a share contradicts what is claimed of it.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stages.evaluation.gate import Outcome, judge
from stages.evaluation.metrics import Bools
from stages.evaluation.predictions import VersionPredictions
from stages.evaluation.statistics.intervals import wilson
from stages.params.gate import Gate

TOP1 = 0.8
"""Of the version in force."""
CLASSES = 10


@dataclass(frozen=True)
class Scenario:
    """Two models: by how much the candidate differs in truth, and what is claimed of the verdict."""

    name: str
    result: Outcome
    claim: Literal["at most", "at least"]
    share: float
    """Of the draws that may, or shall, end with `result`."""
    test: int = 1000
    fresh: int = 0
    disagreement: float = 0.12
    on_test: float = 0.0
    """Gain in top-1."""
    on_fresh: float = 0.0
    one_class: float = 0.0
    """Gain in the recall of one class of ten; the others make up for it."""


ALPHA, ALPHA_INFERIOR = Gate().alpha, Gate().alpha_inferior
SCENARIOS = (
    *(
        Scenario(f"equal, {d:.0%} answered differently", "passed", "at most", ALPHA, disagreement=d)
        for d in (0.08, 0.12, 0.16)
    ),
    Scenario("equal, with 400 fresh images", "passed", "at most", ALPHA, fresh=400),
    Scenario("equal, 10,000 test and 2,000 fresh images", "passed", "at most", ALPHA, test=10_000, fresh=2000),
    Scenario("identical", "passed", "at most", 0.0, fresh=400, disagreement=0.0),
    Scenario("1 point worse on test, 6 better on fresh", "passed", "at most", ALPHA_INFERIOR, test=10_000, fresh=1000,
             on_test=-0.01, on_fresh=0.06),
    *(
        Scenario(f"3 points better on test, {d:.0%} answered differently", "passed", "at least", 0.5, disagreement=d,
                 on_test=0.03)
        for d in (0.08, 0.12, 0.16)
    ),
    Scenario("3 points better on test, with 400 fresh images, 3 better too", "passed", "at least", 0.5, fresh=400,
             on_test=0.03, on_fresh=0.03),
    *(
        Scenario(f"equal on {n:,} test images, 6 points better on 1,000 fresh; {d:.0%}", "passed", "at least", 0.5,
                 test=n, fresh=1000, on_fresh=0.06, disagreement=d)
        for n, d in ((1000, 0.08), (1000, 0.12), (1000, 0.16), (10_000, 0.12))
    ),
    Scenario("equal, every class: fails", "failed", "at most", ALPHA, fresh=400),
    Scenario("one class of ten 25 points worse, the rest makes up: fails", "failed", "at least", 0.5, one_class=-0.25),
    Scenario("4 points worse: fails", "failed", "at least", 0.5, on_test=-0.04),
    Scenario("4 points worse: passes", "passed", "at most", 0.001, on_test=-0.04),
)  # fmt: skip


class Pair:
    """Draws both models' answers to the images of a scenario, which are always the same ones."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        n, test = scenario.test + scenario.fresh, scenario.test
        self.keys = tuple(f"target/val/c/{i:06d}.JPEG" for i in range(n))
        self.split = np.where(np.arange(n) < test, "test", "fresh")
        self.batch = np.where(np.arange(n) < test, "target", np.where(np.arange(n) % 2, "d-one", "d-two"))
        self.labels = np.arange(n) % CLASSES
        self.gain = np.where(self.split == "test", scenario.on_test, scenario.on_fresh)
        if scenario.one_class:
            rest = (scenario.on_test - scenario.one_class / CLASSES) * CLASSES / (CLASSES - 1)
            self.gain = np.where(self.labels == 0, scenario.one_class, rest)
        # Some classes are harder than others, and there the two disagree more.
        self.share = np.maximum(scenario.disagreement * (0.6 + 0.8 * self.labels / (CLASSES - 1)), np.abs(self.gain))

    def draw(self, rng: np.random.Generator) -> tuple[VersionPredictions, VersionPredictions]:
        """Candidate and version in force."""
        chance = rng.random(len(self.keys))
        won, lost = (self.share + self.gain) / 2, (self.share - self.gain) / 2
        only_now, only_before = chance < won, (chance >= won) & (chance < won + lost)
        both = chance >= won + lost + (1 - TOP1 - won)
        return self._answers("candidate", only_now | both), self._answers("in force", only_before | both)

    def _answers(self, name: str, correct: Bools) -> VersionPredictions:
        predicted = np.where(correct, self.labels, (self.labels + 1) % CLASSES)
        return VersionPredictions(name, self.keys, self.split, self.batch, self.labels, predicted)


def shares(scenario: Scenario, draws: int, seed: int = 1) -> Counter[str]:
    """How often each verdict came out."""
    rng, pair, gate = (
        np.random.default_rng(seed),
        Pair(scenario),
        Gate(min_top1=0, min_worst_class=0, max_ece=1),
    )
    counts: Counter[str] = Counter()
    for _ in range(draws):
        candidate, in_force = pair.draw(rng)
        top1 = float(candidate.correct[candidate.test].mean())
        figures = {"top1": top1, "worst_class_recall": 0.5, "ece": 0.05}
        counts[judge(candidate, figures, 1, 1.0, in_force, gate).result] += 1
    return counts


def measured(scenario: Scenario, draws: int) -> dict[str, Any]:
    """A row of the table: shares of the verdicts, the interval of the one claimed, and whether the claim holds."""
    began = time.perf_counter()
    counts = shares(scenario, draws)
    low, high = (float(end) for end in wilson(counts[scenario.result], draws, 0.95))
    # A claim is contradicted where the whole interval lies on its other side.
    holds = low <= scenario.share if scenario.claim == "at most" else high >= scenario.share
    found = {result: counts[result] / draws for result in ("passed", "inconclusive", "failed")}
    seconds = time.perf_counter() - began
    return {**asdict(scenario), "draws": draws, **found, "low": low, "high": high, "holds": holds, "seconds": seconds}


def _line(row: dict[str, Any]) -> str:
    ends = f"{100 * row['low']:5.1f} – {100 * row['high']:5.1f} %"
    parts = [f"{100 * row[result]:6.1f}" for result in ("passed", "inconclusive", "failed")]
    claim = f"{row['result']} {row['claim']} {100 * row['share']:g} %"
    return f"{row['name']:<64}{''.join(f'{p:>9}' for p in parts)}  {ends}  {claim:<24}{'' if row['holds'] else 'NO'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 with --check where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="writes the rows there too")
    parser.add_argument("--check", action="store_true", help="ends with 1 where a claim does not hold")
    options = parser.parse_args(arguments)
    header = f"{'verdicts in %':<64}{'passed':>9}{'inconcl.':>9}{'failed':>9}  {'95 % interval of':<16}  claim"
    print(header, flush=True)
    rows = []
    for scenario in SCENARIOS:
        rows.append(measured(scenario, options.draws))
        print(_line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(options.check and not all(row["holds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
