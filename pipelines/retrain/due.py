"""Whether retraining is due: enough new images, drift, or something new and a model that has grown old."""

import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any

from pipelines.retrain.branch import Branches
from pipelines.retrain.deliveries import Delivery
from pipelines.retrain.steps import Retraction, Work, incoming, shown
from stages.params.retrain import Retrain

DAY = 86_400


def nothing_new(work: Work, branches: Branches, deliveries: list[Delivery]) -> str:
    """Why there is nothing to do, as far as that is known without validation; else empty."""
    if branches.ahead and is_old(branches.policy, branches.trained):
        return ""
    if not deliveries:
        ahead = f"; `{branches.base}` is ahead of `{branches.name}`, and waits for the next" if branches.ahead else ""
        where = shown(str(incoming()))
        return f"no new delivery in {where}{'' if incoming().exists() else ', which is no folder'}{ahead}"
    # If the facts are the same as at the last decision, the images need not be validated for it again.
    waiting = work.memory.waiting
    if waiting.get("for") != _facts(branches, deliveries):
        return ""
    if due(branches.policy, waiting["images"], waiting["drifted"], is_old(branches.policy, branches.trained)):
        return ""
    _leave_waiting(work, deliveries)
    return not_due(branches.policy, waiting["images"])


def decide(
    work: Work,
    branches: Branches,
    deliveries: list[Delivery],
    validation: dict[str, Any],
    retraction: Retraction | None,
) -> bool:
    """Whether to train; the report gets the reason.

    Args:
        validation: reports/validation.json.
    """
    report, policy = work.report, branches.policy
    if retraction:
        report.taken_back = retraction.batch
        report.why = f"{retraction.batch} was taken back{f' ({retraction.reason})' if retraction.reason else ''}"
        return True
    names = [each.batch for each in deliveries]
    images, drifting = new_images(validation, names), drifted(validation, names)
    anything = bool(names) or branches.ahead
    report.why = due(policy, images, drifting, is_old(policy, branches.trained)) if anything else ""
    if report.why:
        return True
    report.why = not_due(policy, images) if names else "no delivery that is fit for training"
    if names:
        work.memory.waiting = {"for": _facts(branches, deliveries), "images": images, "drifted": drifting}
        work.memory.save()
        _leave_waiting(work, deliveries)
    return False


def new_images(validation: dict[str, Any], names: Iterable[str]) -> int:
    """Number of accepted training images of batches, by reports/validation.json."""
    return sum(int(validation["batches"][name]["splits"].get("train", 0)) for name in names)


def drifted(validation: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The batches that differ from those before them."""
    return [name for name in names if any(fact["drifted"] for fact in validation["batches"][name]["drift"])]


def is_old(policy: Retrain, trained: float) -> bool:
    """Whether the last training (seconds since the epoch; 0: never) is as old as `max_age_days`."""
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
    """The report's reason for not retraining."""
    return f"retraining is not due yet: {_count(images)}, and it takes {policy.min_images} (retrain.min_images)"


def _count(images: int) -> str:
    return f"{images:,} new training image{'' if images == 1 else 's'}"


def _facts(branches: Branches, deliveries: list[Delivery]) -> str:
    """sha256 of everything that a decision rests on, except the clock and the policy."""
    facts = [branches.start, branches.base_tip, [[each.batch, each.digest] for each in deliveries]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _leave_waiting(work: Work, deliveries: list[Delivery]) -> None:
    work.report.left_alone |= {each.name: "waits until retraining is due" for each in deliveries}
