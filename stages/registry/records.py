"""What the run of a version keeps of its registration, read back: predictions, verdict, figures, canary, exports.

Names and formats of these files never change: versions registered by older code are read as well.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from stages.evaluation.gate import SIZE, Verdict
from stages.evaluation.predictions import read_predictions
from stages.registry import artifacts
from stages.registry.tags import LATENCY
from stages.registry.versions import Version
from stages.runtime import layout

logger = logging.getLogger(__name__)

GATE, REVIEW, CANARY, EXPORTS = "gate.json", "review.html", "canary.parquet", "exports.json"
"""Files in `own_folder`."""


def own_folder(name: str) -> str:
    """Where a run keeps what belongs to one registration: its model may be registered under several names."""
    return f"registered/{name}"


def predictions(version: Version) -> pd.DataFrame | None:
    """The version's reports/predictions.parquet; None where it is gone or cannot be read, which is logged."""
    why = "its run holds none, or is gone"
    with tempfile.TemporaryDirectory() as folder:
        path = artifacts.download(version.run_id, layout.PREDICTIONS.as_posix(), Path(folder))
        try:
            if path:
                return read_predictions(path)
        except (KeyError, ValueError, OSError) as error:
            why = f"those of its run cannot be read: {error}"
    logger.warning("warning: no predictions of version %d are recorded (%s)", version.number, why)
    return None


def metrics(version: Version) -> dict[str, Any] | None:
    """The version's reports/metrics.json; None where it is gone.

    Raises:
        ValueError: it is damaged.
    """
    return _json(version, layout.METRICS.as_posix())


def verdict(version: Version) -> Verdict | None:
    """The verdict of its gate.json; None where it is gone, damaged or of an older form: the card has its reasons."""
    try:
        values = _own_json(version, GATE)
        return Verdict.from_dict(values) if values else None
    except (KeyError, TypeError, ValueError):
        return None


def figures(version: Version) -> dict[str, float | None]:
    """`test` of the version's metrics.json, its `latency_ms` and its `size_mb`, as far as they are recorded."""
    found: dict[str, float | None] = {}
    try:
        found |= (metrics(version) or {"test": {}})["test"]
        conditions = (_own_json(version, GATE) or {"conditions": []})["conditions"]
        found["size_mb"] = next((each["figure"] for each in conditions if each["name"] == SIZE), None)
        found["latency_ms"] = float(version.tags[LATENCY]) if LATENCY in version.tags else None
    except (KeyError, TypeError, ValueError) as error:  # the card shows `–` for them
        logger.warning("warning: not all figures recorded with version %d can be read: %s", version.number, error)
    return found


def canary(version: Version) -> pd.DataFrame | None:
    """Recorded images: `image` (encoded), `probabilities` (by class id); None where they are gone or cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        path = artifacts.download(version.run_id, f"{own_folder(version.name)}/{CANARY}", Path(folder))
        try:
            return pd.read_parquet(path, columns=["image", "probabilities"]) if path else None
        except (ValueError, OSError) as error:
            logger.warning("warning: the recorded images of version %d cannot be read: %s", version.number, error)
            return None


def exports(version: Version) -> dict[str, Any]:
    """What stages.export has recorded, by format; a damaged record counts as none, which is logged."""
    try:
        return _own_json(version, EXPORTS) or {}
    except ValueError as error:
        logger.warning("warning: the exports recorded with version %d cannot be read: %s", version.number, error)
        return {}


def review_page(version: Version) -> str | None:
    """Its review.html; None where it is gone."""
    return _text(version, f"{own_folder(version.name)}/{REVIEW}")


def _own_json(version: Version, name: str) -> dict[str, Any] | None:
    return _json(version, f"{own_folder(version.name)}/{name}")


def _json(version: Version, path: str) -> dict[str, Any] | None:
    text = _text(version, path)
    return None if text is None else json.loads(text)


def _text(version: Version, path: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        file = artifacts.download(version.run_id, path, Path(folder))
        return file.read_text(encoding="utf-8") if file else None
