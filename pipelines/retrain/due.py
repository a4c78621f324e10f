"""Whether retraining is due: enough new images, drift, or something new and a model that has grown old."""

import time
from collections.abc import Iterable
from typing import Any

from stages.params.retrain import Retrain

DAY = 86_400


def new_images(validation: dict[str, Any], names: Iterable[str]) -> int:
    """Accepted training images of batches, by reports/validation.json."""
    return sum(int(validation["batches"][name]["splits"].get("train", 0)) for name in names)


def drifted(validation: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the batches that differ from what came before them."""
    return [name for name in names if any(fact["drifted"] for fact in validation["batches"][name]["drift"])]


def is_old(policy: Retrain, trained: float) -> bool:
    """Whether what was trained last (seconds since the epoch; 0: never) is as old as `max_age_days`."""
    return policy.max_age_days is not None and time.time() - trained >= policy.max_age_days * DAY


def due(policy: Retrain, images: int, drifting: list[str], old: bool) -> str:
    """Why retraining is due, given that there is something new; empty where it is not."""
    if images >= policy.min_images:
        return f"{_count(images)} (retrain.min_images: {policy.min_images})"
    if drifting and policy.on_drift:
        return f"drift in {', '.join(drifting)}"
    if old:
        return f"something is new, and the last training is older than {policy.max_age_days:g} days"
    return ""


def not_due(policy: Retrain, images: int) -> str:
    """What is told instead."""
    return f"retraining is not due yet: {_count(images)}, and it takes {policy.min_images} (retrain.min_images)"


def _count(images: int) -> str:
    return f"{images:,} new training image{'' if images == 1 else 's'}"
