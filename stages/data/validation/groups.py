"""Groups of images that belong together, over all batches: on which side of a split earlier ones have them."""

import pandas as pd

from stages.data.validation.splits import SIDES


def group_table(images: pd.DataFrame) -> pd.DataFrame:
    """One row per group of a role: role, group, `sides` (how many its accepted images stand on: train, val, and test or
    fresh; what a finetune group is tested on and pretraining trains on are two) and, where these are several, `where`.
    """
    good = images.loc[
        (images["reason"] == "") & (images["group"] != ""), ["arrival", "batch", "role", "group", "split"]
    ]
    good = good.assign(side=good["split"].replace("fresh", "test"))
    counts = good.groupby(["role", "group", "side"]).size().unstack("side").reindex(columns=list(SIDES)) > 0
    table = counts.sum(axis=1).rename("sides").reset_index()
    pretrained = set(good.loc[(good["role"] == "pretrain") & (good["side"] == "train"), "group"])
    seen = (table["role"] == "finetune") & table["group"].isin(pretrained) & ~counts["train"].to_numpy()
    table["sides"] += seen
    wrong = set(table.loc[table["sides"] > 1, "group"])
    of = good[good["group"].isin(wrong)].groupby(["group", "arrival", "batch", "split"]).size().reset_index(name="n")
    of["where"] = of["batch"] + " " + of["split"] + " " + of["n"].astype(str)
    return table.assign(where=table["group"].map(of.groupby("group")["where"].agg(", ".join)))
