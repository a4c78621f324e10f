"""Later deliveries: figures on the fresh images of each batch, and their gap to the test images."""

from pathlib import Path

from stages.evaluation.evaluator import EvaluationInputs, ReportSection, Result, rounded
from stages.evaluation.metrics import Bools
from stages.evaluation.statistics import intervals

name = "fresh"


def measure(inputs: EvaluationInputs) -> Result:
    """`fresh`: by batch, the figures of `test` and `gap_to_test`."""
    fresh, settings = inputs.fresh, inputs.settings
    figures = {}
    for index, batch in enumerate(fresh.samples.batch_names):
        rows = fresh.samples.batch == index
        if rows.any():
            gap = _gap_to_test(fresh.scores.correct[rows], inputs.test.scores.correct, settings.confidence)
            figures[batch] = intervals.figures(fresh.finetuned[rows], fresh.labels[rows], settings) | gap
    return Result(
        ReportSection(Path(__file__).with_suffix(".html.j2"), {"fresh": rounded(figures)}), {"fresh": figures}
    )


def _gap_to_test(correct: Bools, of_test: Bools, confidence: float) -> dict[str, float]:
    """Top-1 on fresh images less top-1 on test, which are different images."""
    counts = int(correct.sum()), len(correct), int(of_test.sum()), len(of_test)
    low, high = intervals.newcombe(*counts, confidence)
    return {
        "gap_to_test": counts[0] / counts[1] - counts[2] / counts[3],
        "gap_to_test_low": float(low),
        "gap_to_test_high": float(high),
    }
