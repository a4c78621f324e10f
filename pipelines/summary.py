"""The results in one short table: `python -m pipelines.summary`, the end of `make repro`."""

import argparse
import json
from typing import Any

from stages.params.register import Register
from stages.registry import versions
from stages.registry.client import enabled, reachable, tracking_uri
from stages.runtime import layout
from stages.runtime.command import run
from stages.runtime.params_file import load_section


def summary_rows() -> list[tuple[str, str]]:
    """Label and value per row, from reports/metrics.json and the registry; what is missing is left out or named.

    Raises:
        StageError: the registry's server or database failed.
    """
    metrics = json.loads(layout.METRICS.read_text(encoding="utf-8")) if layout.METRICS.exists() else {}
    return [*_data_rows(metrics), *_accuracy_rows(metrics), *_version_rows(), *_page_rows()]


def _data_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    data = metrics.get("data", {})
    if data.get("accepted") is None:
        return []
    return [("images", f"{data['accepted']:,} accepted, {data['quarantined']:,} quarantined")]


def _accuracy_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"before": "top-1 before fine-tuning", "test": "top-1 after fine-tuning", "scratch": "top-1 from scratch"}
    return [
        (label, _accuracy(metrics[part]))
        for part, label in names.items()
        if metrics.get(part, {}).get("top1") is not None
    ]


def _accuracy(part: dict[str, Any]) -> str:
    """`85.3 %  (81.0 – 88.9)`: the estimate and its interval, where it has one."""
    text = f"{part['top1']:.1%}".replace("%", " %")
    low, high = part.get("top1_low"), part.get("top1_high")
    return text if low is None or high is None else f"{text}  ({low * 100:.1f} – {high * 100:.1f})"


def _version_rows() -> list[tuple[str, str]]:
    name = load_section("register", Register).name
    if not layout.RECEIPT.exists():
        return [("model", f"{name}: not registered yet")]
    if not enabled():
        return [("model", f"{name}: not registered (SYNSET_TRACKING=off)")]
    with reachable():
        version = versions.find_version(name, json.loads(layout.RECEIPT.read_text(encoding="utf-8"))["sha256"])
    if not version:
        return [("model", f"{name}: not in this registry ({tracking_uri()}); `dvc repro -f -s register` enters it")]
    aliases = "".join(f" @{alias}" for alias in version.aliases)
    return [("model", f"{name}, version {version.number}{aliases}"), ("gate", version.tags.get("gate", "not taken"))]


def _page_rows() -> list[tuple[str, str]]:
    pages = [str(page) for page in (layout.VALIDATION_PAGE, layout.REPORT_PAGE) if page.exists()]
    return [("look at it", "make ui"), *(("", page) for page in pages)]


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = summary_rows()
    width = max(len(label) for label, _ in rows)
    rule = "-" * (width + 2 + max(len(value) for _, value in rows))
    print(rule, *(f"{label:<{width}}  {value}" for label, value in rows), rule, sep="\n")


if __name__ == "__main__":
    run(main)
