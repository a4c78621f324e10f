"""reports/report.html: one file that a reviewer reads from top to bottom, without network; its scripts add no content.

The evaluators compute everything that it shows; their templates place it. Whatever is drawn is SVG, in shares of the
space it gets, so that it fits a laptop, a narrow window and paper.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stages.evaluation.evaluator import EvaluationInputs, Result
from stages.pages import templates


def render(inputs: EvaluationInputs, results: Mapping[str, Result], figures: Mapping[str, Any], sha256: str) -> str:
    """The page. The same results give the same bytes.

    Args:
        results: by the evaluators' names, in the order of their sections. The header takes its worst class from
            `per_class`, its worst slice from `slices`.
        figures: as in reports/metrics.json.
        sha256: of the fine-tuned weights.
    """
    shared = {
        "figures": figures,
        "test": figures["test"],
        "classes": inputs.classes,
        "settings": inputs.settings.model_dump(),
        "level": f"{100 * inputs.settings.confidence:g}\N{NO-BREAK SPACE}%",
    }
    sections = [result.section for result in results.values()]
    return templates.render(
        Path(__file__).with_name("page.html.j2"),
        **shared,
        sections=[Markup(templates.render(section.template, **shared, **section.values)) for section in sections],
        values={name: result.section.values for name, result in results.items()},
        config=inputs.config,
        sha256=sha256,
    )
