"""What is counted after the images were judged: tables of batches, classes of a batch, classes, and drift."""

import numpy as np
import pandas as pd

from stages.data.validation.drift import FactDrift
from stages.data.validation.sequences import sequence_table
from stages.data.validation.splits import PRECEDENCE
from stages.params.batches import ROLES, Batch
from stages.params.validate import Validate


def batch_table(images: pd.DataFrame, batches: dict[str, Batch]) -> pd.DataFrame:
    """One row per batch: batch, role, images, accepted, quarantined, share_quarantined, unlabelled (if finetune), and
    the columns of `sequence_table`, with 0 frames where nothing looks like a sequence, and `test` (accepted test images
    of the first finetune batch; NaN of others)."""
    good = images["reason"] == ""
    nameless = good & (images["class_name"] == "") & (images["role"] == "finetune")
    counts = [
        np.bincount(images["arrival"][rows], minlength=len(batches)) for rows in (slice(None), good, ~good, nameless)
    ]
    table = pd.DataFrame(dict(zip(("images", "accepted", "quarantined", "unlabelled"), counts, strict=True)))
    table["share_quarantined"] = table["quarantined"] / table["images"].clip(lower=1)
    table = table.join(sequence_table(images).set_index("arrival"))
    table["frames"] = table["frames"].fillna(0).astype(np.int64)
    roles = [batch.role for batch in batches.values()]
    table["test"] = np.nan
    if "finetune" in roles:
        first = roles.index("finetune")
        table.loc[first, "test"] = float((good & (images["arrival"] == first) & (images["split"] == "test")).sum())
    return table.assign(batch=list(batches), role=[batch.role for batch in batches.values()])


def look_table(images: pd.DataFrame, batches: dict[str, Batch], limits: Validate) -> pd.DataFrame:
    """One row per class of a batch with enough sound images: batch, role, class_name, images, look (of its largest
    group of look-alikes), alike (images of that group) and share_alike."""
    is_judged = (images["look"] >= 0) & (images["class_name"] != "")
    judged = images.loc[is_judged, ["arrival", "class_name", "look"]]
    alike = judged.groupby(["arrival", "class_name", "look"]).size().rename("alike").reset_index()
    of_class = alike.groupby(["arrival", "class_name"])["alike"]
    alike["images"] = of_class.transform("sum")
    # The first of equally many is the one with the smallest number.
    table = alike.loc[of_class.idxmax()].reset_index(drop=True)
    table = table[table["images"] >= limits.collapse.min_images].reset_index(drop=True)
    names, roles = list(batches), [batch.role for batch in batches.values()]
    return table.assign(
        share_alike=table["alike"] / table["images"],
        batch=[names[arrival] for arrival in table["arrival"]],
        role=[roles[arrival] for arrival in table["arrival"]],
    )


def class_table(images: pd.DataFrame, batches: dict[str, Batch], classes: dict[str, list[str]]) -> pd.DataFrame:
    """One row per class of a role: role, class_name, accepted images by split, `largest` (training images of the role's
    largest class), `imbalance` (`largest` over its own), `held_out` (of a finetune class: images in test, or in val if
    they are fewer) and `new_in` (the later finetune batch that brought it, or None)."""
    is_accepted = (images["reason"] == "") & (images["class_name"] != "")
    accepted = images.loc[is_accepted, ["role", "class_name", "split"]]
    index = pd.MultiIndex.from_tuples(
        [(role, name) for role in ROLES for name in classes[role]], names=["role", "class_name"]
    )
    counts = accepted.groupby(["role", "class_name", "split"]).size().unstack("split")
    table = counts.reindex(index=index, columns=list(PRECEDENCE)).fillna(0).astype(np.int64).reset_index()
    table["largest"] = table.groupby("role")["train"].transform("max")
    table["imbalance"] = table["largest"] / table["train"].where(table["train"] > 0, 0.1)  # never 0 / 0, nor infinite
    of_target = table["role"] == "finetune"
    has_val = table.loc[of_target, "val"].any()
    table["held_out"] = (
        (table[["test", "val"]].min(axis=1) if has_val else table["test"]).where(of_target).astype(float)
    )
    is_finetune = (images["role"] == "finetune") & (images["class_name"] != "")
    finetune = images.loc[is_finetune, ["class_name", "arrival"]]
    brought_by = finetune.groupby("class_name")["arrival"].min()
    first = next((arrival for arrival, batch in enumerate(batches.values()) if batch.role == "finetune"), -1)
    names = list(batches)
    new_in = {name: names[arrival] for name, arrival in brought_by.items() if arrival != first}
    is_new = of_target & table["class_name"].isin(list(new_in))
    table["new_in"] = table["class_name"].map(new_in).where(is_new, None).astype(object)
    return table


def drift_table(drift: dict[str, list[FactDrift]], batches: dict[str, Batch]) -> pd.DataFrame:
    """One row per fact of a batch; `unexplained` where it drifted and the batch has no `accept_drift`."""
    rows = [(name, batches[name].role, *fact) for name, facts in drift.items() for fact in facts]
    table = pd.DataFrame(rows, columns=["batch", "role", *FactDrift._fields])
    excused = table["batch"].map({name: bool(batch.accept_drift) for name, batch in batches.items()}).astype(bool)
    return table.assign(unexplained=table["drifted"].astype(bool) & ~excused)
