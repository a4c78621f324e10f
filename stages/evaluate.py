"""evaluate: shards, models -> reports/: metrics.json, predictions.parquet, label_suspects.csv, plots/, report.html."""

import argparse

from stages.params.evaluate import Evaluate
from stages.params.training.training import Training
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def main() -> None:
    """The models predict, the evaluators measure, the reports are written."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    settings, training = load_section("evaluate", Evaluate), load_section("training", Training)
    from stages.evaluation.evaluating import evaluate

    evaluate(settings, training)


if __name__ == "__main__":
    run(main)
