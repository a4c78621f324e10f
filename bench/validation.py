"""Does `validate` hold at the size of ImageNet? Runs the whole stage on made-up facts, in a folder of its own.

    python -m bench.validation --rows 1331167 --check
    python -m bench.validation --rows 200000 --fresh 2000

With --fresh a second batch arrives afterwards, and the stage runs again: what it wrote for the first batch must be the
same bytes. Measured are the stage's own process from start to end, start and imports included, and the most memory that
it held. With --check it ends with 1 where a goal is missed: 3 minutes, 6 GB, a page below 5 MB, and everything that was
planted found under its own name.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.made_up_facts import Planted, made_up_facts, write_pictures
from bench.memory import sampled_memory
from bench.rounds import ROOT, machine, versions
from stages.data.raw.facts import FACTS
from stages.runtime.files import sha256, write_json
from stages.runtime.params_file import read_params
from stages.runtime.tables import read_table, write_table
from stages.runtime.yaml_text import dump_yaml

GOALS = {"seconds": 180.0, "peak_gb": 6.0, "page_mb": 5.0}
FIRST, SECOND = "imagenet", "fresh"
SAME_PICTURE = {"no_leak_of_test", "no_exact_duplicate", "no_near_duplicate"}
PACKAGES = ("great-expectations", "numpy", "pandas", "pyarrow", "scipy", "simplejpeg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what it measured; 1 with --check where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_331_167, help="of the first batch")
    parser.add_argument("--fresh", type=int, default=0, help="rows of a batch that arrives afterwards")
    parser.add_argument("--json", type=Path, help="writes the figures there too")
    parser.add_argument("--check", action="store_true", help="ends with 1 where a goal is missed")
    parser.add_argument("--folder", type=Path, help="works there and leaves everything lying (an empty folder)")
    options = parser.parse_args(arguments)
    before = machine()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        rounds = measure(options.folder, options.rows, options.fresh)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rounds = measure(Path(folder), options.rows, options.fresh)
    if options.json:
        write_json(options.json, {"rounds": rounds, "machine": before, "versions": versions(*PACKAGES)})
    missed = [f"{each['rows']:,} rows: {goal}" for each in rounds for goal in each["missed"]]
    print("every goal is met" if not missed else "missed: " + "; ".join(missed))
    return int(options.check and bool(missed))


def measure(folder: Path, rows: int, fresh: int) -> list[dict[str, Any]]:
    """One round, and another with a second batch where `fresh` is not 0."""
    planted = [make_batch(folder, FIRST, rows, seed=1)]
    rounds = [run_round(folder, [FIRST], planted)]
    if fresh:
        accepted = folder / f"data/accepted/pretrain/{FIRST}.parquet"
        before = sha256(accepted)
        planted.append(make_batch(folder, SECOND, fresh, seed=2))
        rounds.append(run_round(folder, [FIRST, SECOND], planted))
        if sha256(accepted) != before:
            rounds[-1]["missed"].append("the first batch's accepted images changed")
    return rounds


def make_batch(folder: Path, name: str, rows: int, seed: int) -> Planted:
    """Raw tar and facts of one batch, as ingest and scan leave them."""
    began = time.perf_counter()
    tar = Path("train-00000.tar")
    places = write_pictures(folder / "data/raw/pretrain" / name / tar, seed)
    facts, planted = made_up_facts(name, rows, tar.as_posix(), places, seed)
    write_table(facts, FACTS, folder / f"data/facts/pretrain/{name}.parquet")
    print(f"{name}: {rows:,} rows of facts made up in {time.perf_counter() - began:.0f} s", flush=True)
    return planted


def run_round(folder: Path, batches: list[str], planted: list[Planted]) -> dict[str, Any]:
    """Runs the stage on the batches made so far; figures, and `missed`: the goals that it missed."""
    params = read_params(ROOT / "params.yaml")
    params["batches"] = {name: {"role": "pretrain", "source": "made-up"} for name in batches}
    (folder / "params.yaml").write_text(dump_yaml(params), encoding="utf-8")
    seconds, peak, cpu = _timed([sys.executable, "-m", "stages.validate"], folder)
    report = json.loads((folder / "reports/validation.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = {
        "rows": sum(batch["images"] for batch in report["batches"].values()),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_gb": round(peak / 1e9, 2),
        "page_mb": round((folder / "reports/validation.html").stat().st_size / 1e6, 2),
        "quarantined_by": report["quarantined_by"],
        "noted": {each["name"]: each["failed"] for each in report["expectations"] if each["severity"] == "note"},
    }
    figures["missed"] = [
        *(f"{name} {figures[name]} (goal: {goal:g})" for name, goal in GOALS.items() if figures[name] > goal),
        *(problem for each in planted for problem in _not_found(each, folder, report)),
    ]
    print(json.dumps(figures, indent=1), flush=True)
    return figures


def _timed(command: list[str], folder: Path) -> tuple[float, int, float]:
    """Seconds, the most bytes held by the process and its children together (sampled), and seconds of CPU."""
    began, before = time.perf_counter(), os.times()
    with sampled_memory() as samples:
        done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, max(samples), cpu


def _not_found(planted: Planted, folder: Path, report: dict[str, Any]) -> Iterable[str]:
    """What was planted and is not in the outputs under its own name."""
    bad = read_table(folder / "data/quarantine.parquet").set_index("key")["reason"]
    for kind, pairs in (("exact", planted.exact), ("near", planted.near)):
        reasons = pd.DataFrame(pairs).map(bad.get)
        lost = int((~reasons.isin(SAME_PICTURE).any(axis=1)).sum())
        if lost:
            yield f"{lost} of {len(pairs)} planted {kind} duplicates are not found"
    lost = sum(bad.get(key) != "decodes" for key in planted.broken)
    if lost:
        yield f"{lost} of {len(planted.broken)} broken files are not found"
    failed = {each["name"]: each["failed"] for each in report["expectations"]}
    for name, keys in (("usual_brightness", planted.dark), ("usual_resolution", planted.huge)):
        if failed.get(name, 0) < len(keys):
            yield f"{name} noted {failed.get(name, 0)} of {len(keys)} planted outliers"
    if not any(planted.collapsed in note for note in report.get("notes", [])):
        yield f"no note names the collapsed class {planted.collapsed}"


if __name__ == "__main__":
    sys.exit(main())
