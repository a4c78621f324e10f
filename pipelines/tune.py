"""Searches for better parameters of fine-tuning: `python -m pipelines.tune`, with Optuna. docs/tuning.md.

Each trial is a process of `stages.finetune --trial` with a params file and a folder of its own, and is judged on val
alone: no trial opens the test split. The study lies in `.synset/tune/`, under a fingerprint of everything that is not
searched (except the machine), so a search goes on where it was stopped, and never mixes with the trials of another one.
Several workers (this command, in several terminals) share one study.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from stages.params.tune import Tune
from stages.runtime.command import run
from stages.runtime.params_file import ParamsError, check, load_section
from stages.runtime.yaml_text import parse_yaml

COMMAND = (sys.executable, "-m", "stages.finetune", "--trial")


def tune_section(trials: int | None, space: Path | None) -> Tune:
    """The section `tune` of params.yaml, with another number of trials, or another space, from a YAML file.

    Raises:
        ParamsError: the section or the file is wrong.
    """
    tune = load_section("tune", Tune)
    changes: dict[str, Any] = {"trials": trials} if trials is not None else {}
    if space:
        try:
            changes["space"] = parse_yaml(space.read_text(encoding="utf-8"), str(space))
        except (OSError, UnicodeDecodeError) as error:
            raise ParamsError(f"{space} cannot be read: {error}") from None
    return check("tune", {**tune.model_dump(), **changes}, Tune, space if space else None)


def main() -> None:
    """One worker: runs trials until the study has as many as wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="in all, over all workers; default: tune.trials of params.yaml")
    parser.add_argument("--space", type=Path, metavar="FILE", help="YAML, instead of tune.space of params.yaml")
    options = parser.parse_args()
    tune = tune_section(options.trials, options.space)
    from pipelines.tuning.search import search

    search(tune, COMMAND)


if __name__ == "__main__":
    run(main)
