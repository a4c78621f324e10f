"""validate: a fold over batches in order of arrival, that stops where the whole is not fit."""

import hashlib
import io
import json
import logging
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image, ImageFilter

from stages import validate
from stages.data.raw.facts import ACCEPTED, FACTS, QUARANTINE
from stages.data.validation.judging import ValidationResult, judge
from stages.data.validation.splits import content_fractions
from stages.data.validation.summary import summary
from stages.data.validation.validating import assign, write_outputs
from stages.params.batches import Batch
from stages.params.split import Split
from stages.params.validate import Collapse, Outliers, Severities, Validate
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from stages.runtime.tables import read_table, write_table
from tests.raw_tars import scan_tar

LENIENT = Validate(max_quarantined=1, min_images_per_class=1)
SPLIT = Split(val_fraction=0.1, test_fraction=0.2, fresh_fraction=0.2)


def _batches(**roles: str) -> dict[str, Batch]:
    return {name: Batch(role=role, source="sample:target") for name, role in roles.items()}  # type: ignore[arg-type]


def _image(
    batch: str, split: str, class_name: str, name: str, content: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Facts of a sound image; the same `content` means the same bytes, and a random hash means no look-alike."""
    digest = hashlib.sha256((content or f"{batch}/{split}/{class_name}/{name}").encode()).hexdigest()
    return {
        "key": f"{batch}/{split}/{class_name}/{name}", "batch": batch, "source_split": split, "class_name": class_name,
        "tar": f"{split}/{class_name}.tar", "offset": 0, "bytes": 1000, "sha256": digest, "format": "JPEG",
        "width": 64, "height": 64, "mode": "RGB", "orientation": 1, "decodes": True, "error": "",
        "hash": int(digest[:16], 16), "brightness": 100.0, "contrast": 40.0, "group": "",
    } | changes  # fmt: skip


def _pool(batch: str, count: int = 30, classes: str = "ab", split: str = "all") -> list[dict[str, Any]]:
    return [_image(batch, split, name, f"{number}.jpg") for name in classes for number in range(count)]


def _train_content(count: int) -> list[str]:
    """Contents that fall into train, in a first batch and in a later one."""
    candidates = [f"content {number}" for number in range(200 * count)]
    shas = pd.Series([hashlib.sha256(content.encode()).hexdigest() for content in candidates])
    last = np.min([content_fractions(shas, name) for name in ("test", "val", "fresh")], axis=0) > 0.6
    return [content for content, is_last in zip(candidates, last.tolist(), strict=True) if is_last][:count]


def _judge(
    rows: list[dict[str, Any]], batches: dict[str, Batch], limits: Validate = LENIENT, same: bool = True
) -> ValidationResult:
    """Judges made-up facts; where hashes match, the pixels say `same`."""
    facts = pd.DataFrame(rows, columns=FACTS.names).astype({"hash": np.uint64})
    facts["role"] = facts["batch"].map({name: batch.role for name, batch in batches.items()})
    facts["arrival"] = facts["batch"].map({name: number for number, name in enumerate(batches)})
    assign(facts, batches, SPLIT)

    def confirmation(rows: pd.DataFrame, raw: object, limits: Validate) -> Any:
        return lambda left, right: np.full(len(left), same)

    return judge(facts, batches, limits, confirmation)


def _reasons(result: ValidationResult) -> dict[str, tuple[str, str]]:
    bad = result.images[result.images["reason"] != ""]
    return {row["key"]: (row["reason"], row["duplicate_of"]) for row in bad.to_dict("records")}


# ------------------------------------------------------------------------------------------------ the fold


def test_of_two_duplicates_the_later_batch_yields_also_across_roles() -> None:
    rows = [*_pool("new"), *_pool("old")]  # names and rows against the order of arrival
    rows += [_image("new", "all", "a", "copy.jpg", "same"), _image("old", "all", "a", "copy.jpg", "same")]
    for roles in ({"old": "finetune", "new": "finetune"}, {"old": "pretrain", "new": "finetune"}):
        result = _judge(rows, _batches(**roles))
        sides = result.images.set_index("key")["split"][["old/all/a/copy.jpg", "new/all/a/copy.jpg"]].tolist()
        name = "no_leak_of_test" if sides[0] != "train" and sides[1] == "train" else "no_exact_duplicate"
        assert _reasons(result) == {"new/all/a/copy.jpg": (name, "old/all/a/copy.jpg")}


def test_of_two_near_duplicates_the_later_yields_where_pixels_agree() -> None:
    hash_ = 0x123456789ABCDEF0
    rows = [*_pool("old"), *_pool("new")]
    old, new = _train_content(2)
    rows += [
        _image("old", "all", "a", "x.jpg", old, hash=hash_),
        _image("new", "all", "a", "x.jpg", new, hash=hash_ ^ 5),
    ]
    batches = _batches(old="finetune", new="finetune")
    assert _reasons(_judge(rows, batches)) == {"new/all/a/x.jpg": ("no_near_duplicate", "old/all/a/x.jpg")}
    assert _reasons(_judge(rows, batches, same=False)) == {}


@pytest.mark.parametrize(("stays", "yields"), [("test", "val"), ("test", "train"), ("val", "train")])
def test_inside_a_batch_test_beats_val_beats_train(stays: str, yields: str) -> None:
    rows = [row for split in ("train", "val", "test") for row in _pool("b", split=split)]
    # By name alone the other one would stay.
    rows += [_image("b", stays, "a", "y.jpg", "same"), _image("b", yields, "a", "x.jpg", "same")]
    reasons = _reasons(_judge(rows, _batches(b="finetune")))
    name = "no_leak_of_test" if yields == "train" else "no_exact_duplicate"
    assert reasons == {f"b/{yields}/a/x.jpg": (name, f"b/{stays}/a/y.jpg")}


def test_it_is_our_split_that_counts_not_the_sources() -> None:
    # train and val only: the source's val is our test.
    rows = [*_pool("b", split="train"), *_pool("b", split="val")]
    rows += [_image("b", "train", "a", "x.jpg", "same"), _image("b", "val", "a", "x.jpg", "same")]
    result = _judge(rows, _batches(b="pretrain"))
    assert _reasons(result) == {"b/train/a/x.jpg": ("no_leak_of_test", "b/val/a/x.jpg")}
    assert set(result.accepted.loc[result.accepted["source_split"] == "val", "split"]) == {"test"}


def test_within_a_split_the_smaller_key_stays() -> None:
    rows = [*_pool("b"), _image("b", "all", "a", "z.jpg", "same"), _image("b", "all", "a", "y.jpg", "same")]
    assert list(_reasons(_judge(rows, _batches(b="finetune")))) == ["b/all/a/z.jpg"]


def test_what_fails_otherwise_makes_nobody_yield() -> None:
    rows = [*_pool("b"), _image("b", "all", "a", "1-damaged.jpg", hash=5, decodes=False, error="cut")]
    rows += [_image("b", "all", "a", "2-sound.jpg", hash=5)]
    assert _reasons(_judge(rows, _batches(b="finetune"))) == {"b/all/a/1-damaged.jpg": ("decodes", "")}


def _messy(names: list[str], seed: int) -> list[dict[str, Any]]:
    """Batches full of exact and near-duplicates of each other, damaged images, outliers, and a class of one picture."""
    rng = np.random.default_rng(seed)
    rows = []
    for name in names:
        for number in range(120):
            hash_ = int(rng.integers(1, 25)) * 0x0123456789ABCDEF % 2**64 ^ 1 << int(rng.integers(0, 64))
            changes: dict[str, Any] = {"decodes": False} if rng.random() < 0.05 else {}
            content = f"{rng.integers(300)}"
            rows.append(_image(name, "all", "ab"[number % 2], f"m{number}.jpg", content, hash=hash_, **changes))
        alike = {"hash": 0xFEDCBA9876543210}
        rows += [_image(name, "all", "a", f"c{number}.jpg", f"{name} {number}", **alike) for number in range(30)]
        pool = _pool(name)
        for row in pool:
            row |= {"brightness": rng.uniform(90, 110), "width": int(rng.integers(60, 70))}
        # More or less an outlier, as the batch is: the same picture in a batch of its own kind would be none.
        pool[0] |= {"brightness": 4.0}
        pool[1] |= {"width": 4000, "height": 3000}
        rows += pool
    return rows


def test_all_at_once_equals_one_by_one_and_an_old_batch_never_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = {"up": "pretrain", "target": "finetune", "week1": "finetune", "more": "pretrain"}
    rows = _messy(list(roles), seed=3)
    severities = Severities(usual_brightness="quarantine")  # resolution is noted
    limits = LENIENT.model_copy(update={"severity": severities, "collapse": Collapse(max_share=0.1)})

    def judged(count: int) -> tuple[ValidationResult, dict[str, Batch], dict[str, bytes]]:
        some = dict(list(roles.items())[:count])
        result = _judge([row for row in rows if row["batch"] in some], _batches(**some), limits)
        folder = tmp_path / str(count)
        folder.mkdir()
        monkeypatch.chdir(folder)
        write_outputs(result, _batches(**some))
        written = {f"{path}": path.read_bytes() for path in Path("data").rglob("*.parquet")}
        return result, _batches(**some), written

    whole, batches, files = judged(len(roles))
    reasons = set(whole.images["reason"])
    assert {"decodes", "no_exact_duplicate", "no_near_duplicate", "no_leak_of_test", "usual_brightness"} <= reasons
    assert whole.noted["usual_resolution"].size == len(roles) and set(whole.collapsed["batch"]) >= {"up"}
    quarantine = read_table(Path("data/quarantine.parquet"))
    report = summary(whole, batches, limits)
    for count in range(1, len(roles)):
        part, some, written = judged(count)
        bad = Path("expected.parquet")
        write_table(quarantine[quarantine["batch"].isin(list(some))], QUARANTINE, bad)
        assert written.pop("data/quarantine.parquet") == bad.read_bytes()
        assert len(written) == count
        assert written == {path: files[path] for path in written}
        assert summary(part, some, limits)["batches"] == {name: report["batches"][name] for name in some}
        kept = whole.collapsed[whole.collapsed["batch"].isin(list(some))].drop(columns="look").reset_index(drop=True)
        pd.testing.assert_frame_equal(part.collapsed.drop(columns="look").reset_index(drop=True), kept)


def test_a_later_finetune_batch_has_fresh_and_the_frozen_test_stays() -> None:
    rows = [*_pool("first", 100), *_pool("later", 100), *_pool("up", 100)]
    accepted = _judge(rows, _batches(first="finetune", up="pretrain", later="finetune")).accepted
    splits = {name: set(group) for name, group in accepted.groupby("batch")["split"]}
    assert splits == {
        "first": {"train", "val", "test"},
        "up": {"train", "val", "test"},
        "later": {"train", "val", "fresh"},
    }


def test_labels_are_positions_in_an_append_only_list() -> None:
    rows = [*_pool("one", classes="bc"), *_pool("two", classes="ab")]
    limits = LENIENT.model_copy(update={"allow_new_classes": True})
    result = _judge(rows, _batches(one="finetune", two="finetune"), limits)
    assert result.classes == {"pretrain": [], "finetune": ["b", "c", "a"]}
    names = result.accepted.groupby("class_name")["label"].unique()
    assert {name: list(label) for name, label in names.items()} == {"b": [0], "c": [1], "a": [2]}
    assert not result.stops


def test_an_unlabelled_pretrain_image_is_accepted_with_label_minus_one() -> None:
    rows = [*_pool("up"), _image("up", "all", "", "x.jpg")]
    result = _judge(rows, _batches(up="pretrain"))
    assert result.accepted.set_index("key").loc["up/all//x.jpg", "label"] == -1
    assert result.classes["pretrain"] == ["a", "b"]
    assert not result.stops


# ------------------------------------------------------------------------------------------------ groups


def _grouped(
    batch: str, groups: Sequence[str], each: int = 4, split: str = "all", tag: str = ""
) -> list[dict[str, Any]]:
    """Images of groups; those of one group are half of class a and half of class b."""
    return [
        _image(batch, split, "ab"[number % 2], f"{group}_{tag}{number}.jpg", group=group)
        for group in groups
        for number in range(each)
    ]


def _sides(result: ValidationResult, batch: str) -> dict[str, set[str]]:
    rows = result.images[result.images["batch"] == batch]
    return {str(group): set(part["split"]) for group, part in rows.groupby("group")}


PATIENTS = [f"p{number}" for number in range(20)]


def test_a_group_goes_into_one_split_and_shares_are_kept() -> None:
    result = _judge(_grouped("new", PATIENTS), _batches(new="finetune"))
    sides = _sides(result, "new")
    assert all(len(each) == 1 for each in sides.values())
    assert Counter(side for each in sides.values() for side in each) == {"train": 14, "test": 4, "val": 2}
    assert not result.stops


def test_of_a_class_with_three_groups_each_goes_elsewhere_whatever_their_size() -> None:
    rows = [each for group, size in (("long", 90), ("x", 3), ("y", 2)) for each in _grouped("new", [group], size)]
    sides = _sides(_judge(rows, _batches(new="finetune")), "new")
    assert sides["long"] == {"train"} and sides["x"] | sides["y"] == {"test", "val"}


def test_images_in_no_group_are_their_own_beside_groups() -> None:
    result = _judge([*_grouped("new", PATIENTS), *_pool("new", 40)], _batches(new="finetune"))
    loose = result.images[result.images["group"] == ""]
    assert Counter(loose["split"])["test"] > 5
    assert all(len(sides) == 1 for group, sides in _sides(result, "new").items() if group)


@pytest.mark.parametrize("roles", [("finetune", "finetune"), ("pretrain", "finetune"), ("finetune", "pretrain")])
def test_a_later_image_follows_its_group_and_nothing_earlier_changes(roles: tuple[str, str]) -> None:
    batches = _batches(old=roles[0], new=roles[1])
    old = [*_grouped("old", PATIENTS), *_pool("old")]
    new = [*_grouped("new", [*PATIENTS, "unseen1", "unseen2"], tag="later"), *_pool("new")]
    alone, both = _judge(old, _batches(old=roles[0])), _judge([*old, *new], batches)
    columns = ["key", "split", "label", "reason"]
    of_old = both.images[both.images["batch"] == "old"]
    assert of_old[columns].to_dict("records") == alone.images[columns].to_dict("records")
    earlier, later = _sides(both, "old"), _sides(both, "new")
    holdout = "fresh" if roles == ("finetune", "finetune") else "test"
    for patient in PATIENTS:
        assert later[patient] == {holdout if side == "test" else side for side in earlier[patient]}, patient
    assert not any("two sides" in stop for stop in both.stops)
    bound = both.images[both.images["batch"] == "new"].groupby("group")["bound"].first()
    assert bound["unseen1"] == "" and {bound[patient] for patient in PATIENTS} == {"train", "val", "test"}


def test_pretraining_keeps_off_the_groups_of_the_target_test_though_its_source_has_them_in_train() -> None:
    rows = [*_grouped("target", PATIENTS), *_grouped("photos", PATIENTS, split="train", tag="more"), *_pool("photos")]
    result = _judge(rows, _batches(target="finetune", photos="pretrain"))
    for patient, sides in _sides(result, "target").items():
        assert _sides(result, "photos")[patient] == sides
    assert not result.stops


@pytest.mark.parametrize("severity", ["stop", "note"])
def test_a_group_on_two_sides_by_the_sources_own_splits_is_named(severity: Any) -> None:
    limits = LENIENT.model_copy(update={"severity": Severities(whole_groups=severity)})
    rows = [*_grouped("new", PATIENTS[:9], split="train"), *_grouped("new", PATIENTS[8:], split="test", tag="t")]
    result = _judge(rows, _batches(new="finetune"), limits)
    (message,) = [each for each in (*result.stops, *result.notes) if "two sides" in each]
    assert "images of 1 groups are on two sides of a split: p8 (new test 4, new train 4)" in message
    assert bool(result.stops) == ("bring it without split folders" in message) == (severity == "stop")
    assert (result.images["split"] == "test").sum() == 4 * 12, "what is published stays as it is"


def test_a_target_test_whose_groups_were_pretrained_on_stops() -> None:
    pretrain = [*_grouped("photos", PATIENTS, split="train"), *_pool("photos")]
    target = [*_grouped("target", PATIENTS[:4], split="test", tag="t"), *_pool("target", split="train")]
    result = _judge([*pretrain, *target], _batches(photos="pretrain", target="finetune"))
    (message,) = [stop for stop in result.stops if "two sides" in stop]
    assert message.startswith("finetune: images of") and "photos train 4, target test 4" in message
    first = _judge([*pretrain, *target], _batches(target="finetune", photos="pretrain"))
    assert not first.stops, "as the message says"


def test_a_target_that_has_no_test_image_left_stops() -> None:
    rows = [*_grouped("photos", PATIENTS, split="train"), *_pool("photos", split="test")]
    rows += _grouped("target", PATIENTS, tag="t")
    (stop,) = _judge(rows, _batches(photos="pretrain", target="finetune")).stops
    assert stop.startswith("batch `target` (finetune): no accepted image is in test") and "before that one" in stop
    assert not _judge(rows, _batches(target="finetune", photos="pretrain")).stops


def test_a_class_without_test_images_is_named() -> None:
    rows = [*_pool("new"), *[_image("new", "all", "rare", f"{number}.jpg") for number in range(2)]]
    result = _judge(rows, _batches(new="finetune"))
    (note,) = [note for note in result.notes if "gate" in note]
    assert "of 1 classes: rare (test 0, val 0, train 2). The gate judges no class that has none in test" in note
    assert not _judge(_pool("new", 3), _batches(new="finetune")).notes
    assert not any("gate" in note for note in _judge(rows, _batches(new="pretrain")).notes), "nothing is tested there"


def test_copies_and_damaged_images_do_not_take_the_places_of_a_small_class() -> None:
    rows = [_image("new", "all", "a", f"{number}.jpg", "same") for number in range(6)]
    rows += [_image("new", "all", "a", f"cut{number}.jpg", decodes=False) for number in range(6)]
    rows += [_image("new", "all", "a", f"good{number}.jpg") for number in range(2)]
    assert sorted(_judge(rows, _batches(new="finetune")).accepted["split"]) == ["test", "train", "val"]


# ------------------------------------------------------------------------------------------------ conflicts of labels


def _conflicts(result: ValidationResult) -> dict[str, str]:
    return {key: of for key, (reason, of) in _reasons(result).items() if reason == "no_label_conflict"}


@pytest.mark.parametrize("contents", [("same", "same"), ("one", "other")])
def test_one_picture_with_two_classes_in_a_batch_stays_out_with_both(contents: tuple[str, str]) -> None:
    looks = {"hash": 0x123456789ABCDEF0}
    rows = [*_pool("b"), *(_image("b", "all", c, "x.jpg", of, **looks) for c, of in zip("ab", contents, strict=True))]
    rows += [
        _image("b", "all", "a", "again.jpg", contents[0], **looks),
        _image("b", "all", "", "x.jpg", "same", **looks),
    ]
    result = _judge(rows, _batches(b="pretrain"))
    # The unlabelled one conflicts with nobody, and as the others are out, it stays.
    first = "b/all/a/again.jpg"
    assert _reasons(result).keys() == {"b/all/a/x.jpg", "b/all/b/x.jpg", first}
    assert {of for _, of in _reasons(result).values()} <= {"b/all/a/x.jpg", "b/all/b/x.jpg", first}
    assert result.failed["no_label_conflict"] == 3
    report = summary(result, _batches(b="pretrain"), LENIENT)
    assert report["label_conflicts"] == [{"role": "pretrain", "classes": ["a", "b"], "images": 3}]
    assert report["quarantined_by"] == {"no_label_conflict": 3}


@pytest.mark.parametrize("contents", [("same", "same"), ("one", "other")])
def test_across_batches_of_a_role_only_the_later_image_of_a_conflict_stays_out(contents: tuple[str, str]) -> None:
    looks = {"hash": 0x123456789ABCDEF0}
    old = [*_pool("old"), _image("old", "all", "b", "x.jpg", contents[0], **looks)]
    new = [*_pool("new"), _image("new", "all", "a", "x.jpg", contents[1], **looks)]
    assert _reasons(_judge(old, _batches(old="finetune"))) == {}
    result = _judge([*new, *old], _batches(old="finetune", new="finetune"))
    assert _reasons(result) == {"new/all/a/x.jpg": ("no_label_conflict", "old/all/b/x.jpg")}


def test_classes_of_two_roles_may_differ() -> None:
    rows = [*_pool("up"), *_pool("target"), _image("up", "all", "b", "x.jpg", "same")]
    result = _judge([*rows, _image("target", "all", "a", "x.jpg", "same")], _batches(up="pretrain", target="finetune"))
    assert _reasons(result).keys() == {"target/all/a/x.jpg"} and _conflicts(result) == {}


def test_a_picture_that_was_in_conflict_before_still_is_when_it_comes_again() -> None:
    old = [_image("old", "all", name, "x.jpg", "same") for name in "ab"]
    new = [_image("new", "all", "b", "x.jpg", "same"), _image("new", "all", "", "y.jpg", "same")]
    result = _judge([*_pool("old"), *old, *_pool("new"), *new], _batches(old="pretrain", new="pretrain"))
    assert _conflicts(result).keys() == {"old/all/a/x.jpg", "old/all/b/x.jpg", "new/all/b/x.jpg"}
    assert _conflicts(result)["new/all/b/x.jpg"] == "old/all/a/x.jpg"


def test_a_conflict_that_is_only_noted_leaves_the_rules_of_duplicates() -> None:
    rows = [*_pool("b"), *(_image("b", "all", name, "x.jpg", "same") for name in "ab")]
    lenient = LENIENT.model_copy(update={"severity": Severities(no_label_conflict="note")})
    result = _judge(rows, _batches(b="pretrain"), lenient)
    assert len(_reasons(result)) == 1 and result.failed["no_label_conflict"] == 2
    assert len(_noted(result, "no_label_conflict")) == 1
    assert summary(result, _batches(b="pretrain"), lenient)["label_conflicts"][0]["images"] == 2


def test_the_stop_for_too_much_quarantined_names_what_took_most_and_what_loosens_it() -> None:
    looks: list[dict[str, Any]] = [{"hash": 0x123456789ABCDEF0, "brightness": value} for value in (100.0, 101.0)]
    rows = [
        *_pool("b", 5),
        *(_image("b", "all", name, "x.jpg", **look) for name, look in zip("ab", looks, strict=True)),
    ]
    (stop,) = _judge(rows, _batches(b="pretrain"), LENIENT.model_copy(update={"max_quarantined": 0.1})).stops
    assert "no_label_conflict takes most" in stop and "validate.near_duplicate_local" in stop
    rows = [*_pool("b", 5), *(_image("b", "all", "a", f"{n}.png", decodes=False, error="cut") for n in range(4))]
    (stop,) = _judge(rows, _batches(b="pretrain"), LENIENT.model_copy(update={"max_quarantined": 0.1})).stops
    assert "decodes takes most, and no parameter" in stop


# ------------------------------------------------------------------------------------------------ more than duplicates


@pytest.mark.parametrize("evaluated", ["test", "val"])
@pytest.mark.parametrize("near", [False, True])
def test_a_train_image_that_is_a_test_image_is_a_leak_and_counted_as_such(evaluated: str, near: bool) -> None:
    rows = [row for split in ("train", "val", "test") for row in _pool("b", split=split)]
    looks = {"hash": 0x123456789ABCDEF0}
    contents = ("one", "other") if near else ("same", "same")
    for split, content in zip((evaluated, "train"), contents, strict=True):
        rows.append(_image("b", split, "a", "x.jpg", content, **looks))
    rows += [_image("b", "train", "b", f"twin{number}.jpg", "twin") for number in range(2)]
    result = _judge(rows, _batches(b="pretrain"))
    assert _reasons(result) == {
        "b/train/a/x.jpg": ("no_leak_of_test", f"b/{evaluated}/a/x.jpg"),
        "b/train/b/twin1.jpg": ("no_exact_duplicate", "b/train/b/twin0.jpg"),
    }
    assert [result.failed[name] for name in ("no_leak_of_test", "no_exact_duplicate", "no_near_duplicate")] == [
        1,
        1,
        0,
    ]
    report = summary(result, _batches(b="pretrain"), LENIENT)
    assert report["batches"]["b"]["quarantined_by"] == {"no_exact_duplicate": 1, "no_leak_of_test": 1}


def _noted(result: ValidationResult, name: str) -> list[str]:
    return result.images["key"].iloc[result.noted[name]].tolist()


def test_outliers_of_a_batch_are_noted_and_stay() -> None:
    rows = _pool("b", 60)
    for number, row in enumerate(rows):
        row |= {"brightness": 100.0 + number % 40, "width": 60 + number % 9}
    odd = [
        _image("b", "all", "a", "dark.jpg", brightness=5.0),
        _image("b", "all", "a", "huge.jpg", brightness=120.0, width=6000, height=4000),
        _image("b", "all", "b", "tiny.jpg", brightness=120.0, width=20, height=16),
    ]
    batches = _batches(b="finetune")
    result = _judge([*rows, *odd], batches)
    assert _noted(result, "usual_brightness") == ["b/all/a/dark.jpg"]
    assert sorted(_noted(result, "usual_resolution")) == ["b/all/a/huge.jpg", "b/all/b/tiny.jpg"]
    assert _reasons(result) == {}
    report = summary(result, batches, LENIENT)
    assert report["noted_by"] == {"usual_resolution": 2, "usual_brightness": 1}
    assert report["batches"]["b"]["noted_by"] == report["noted_by"]
    strict = LENIENT.model_copy(update={"severity": Severities(usual_brightness="quarantine")})
    assert _reasons(_judge([*rows, *odd], batches, strict)) == {"b/all/a/dark.jpg": ("usual_brightness", "")}
    blind = LENIENT.model_copy(update={"outliers": Outliers(resolution=None)})
    assert "usual_resolution" not in _judge([*rows, *odd], batches, blind).failed


def test_a_class_that_is_one_picture_is_noted_or_stops_as_told() -> None:
    placeholder = [_image("b", "all", "c", f"{n}.jpg", f"coded {n}", hash=0xABCDEF0123456789) for n in range(30)]
    rows = [*_pool("b", 40), *placeholder, *_pool("b", 10, classes="c")]
    batches = _batches(b="finetune")
    for same in (True, False):  # whether pixels confirm it or hashes alone say so
        result = _judge(rows, batches, same=same)
        assert result.collapsed[["batch", "class_name", "alike", "images"]].to_numpy().tolist() == [["b", "c", 30, 40]]
        assert "batch `b` (finetune)" in result.notes[0] and "c 30 of 40" in result.notes[0]
        assert not result.stops
    strict = LENIENT.model_copy(update={"severity": Severities(varied_class="stop")})
    (message,) = _judge(rows, batches, strict).stops
    assert "c 30 of 40" in message and "validate.collapse.max_share" in message
    lenient = LENIENT.model_copy(update={"collapse": Collapse(max_share=0.8)})
    assert _judge(rows, batches, lenient).collapsed.empty
    small = LENIENT.model_copy(update={"collapse": Collapse(min_images=41)})
    assert _judge(rows, batches, small).collapsed.empty


def test_a_class_of_copies_of_an_older_image_is_one_picture_too() -> None:
    rows = [*_pool("old"), _image("old", "all", "a", "x.jpg", hash=0xABCDEF0123456789)]
    copies = [_image("new", "all", "b", f"{n}.jpg", hash=0xABCDEF0123456789 ^ 1 << n) for n in range(25)]
    result = _judge([*rows, *_pool("new", classes="a"), *copies], _batches(old="finetune", new="finetune"))
    assert result.collapsed[["batch", "class_name", "alike"]].to_numpy().tolist() == [["new", "b", 25]]


def test_a_class_that_others_outnumber_is_noted() -> None:
    rows = [*_pool("b", 400, classes="a"), *_pool("b", 120, classes="b"), *_pool("b", 20, classes="c")]
    result = _judge(rows, _batches(b="finetune"))
    assert result.failed["balanced"] == 1
    (note,) = result.notes
    assert note.startswith("finetune: 1 class has so few training images") and "c has" in note
    equal = _judge(_pool("b", 100, classes="abc"), _batches(b="finetune"))
    assert equal.failed["balanced"] == 0 and not equal.notes


def test_duplicates_that_are_only_noted_stay() -> None:
    rows = [*_pool("b"), _image("b", "all", "a", "y.jpg", "same"), _image("b", "all", "a", "z.jpg", "same")]
    lenient = LENIENT.model_copy(update={"severity": Severities(no_exact_duplicate="note")})
    result = _judge(rows, _batches(b="finetune"), lenient)
    assert _reasons(result) == {} and _noted(result, "no_exact_duplicate") == ["b/all/a/z.jpg"]


def test_unlabelled_images_pass_and_are_no_class() -> None:
    rows = [
        _image("up", "all", "", f"{n}.jpg", brightness=90.0 + n % 20, hash=7 if n < 30 else n**7) for n in range(60)
    ]
    rows += [_image("up", "all", "", "copy.jpg", rows[0]["sha256"], sha256=rows[0]["sha256"])]
    rows += [_image("up", "all", "", "dark.jpg", brightness=1.0)]
    result = _judge([*rows, *_pool("target")], _batches(up="pretrain", target="finetune"), same=False)
    assert list(_reasons(result)) == [max("up/all//copy.jpg", "up/all//0.jpg")]
    assert not result.stops and not result.notes and result.collapsed.empty
    assert _noted(result, "usual_brightness") == ["up/all//dark.jpg"]
    report = summary(result, _batches(up="pretrain", target="finetune"), LENIENT)
    assert report["classes"]["pretrain"] == {}


# ------------------------------------------------------------------------------------------------ stops


def _stops(rows: list[dict[str, Any]], limits: Validate, **roles: str) -> str:
    return "\n".join(_judge(rows, _batches(**roles), limits).stops)


def test_too_much_quarantined_stops_with_figures_keys_and_the_parameter() -> None:
    rows = [*_pool("b", 90), *[_image("b", "all", "a", f"x{i}", decodes=False, error="cut") for i in range(60)]]
    message = _stops(rows, Validate(), b="finetune")
    for part in (
        "batch `b` (finetune)",
        "25.0%",
        "60 of 240",
        "≤ 0.1",
        "validate.max_quarantined",
        "decodes 60",
        "b/all/a/x0 (decodes: cut)",
    ):
        assert part in message
    assert "x9" not in message  # the first few keys, not all


def test_a_batch_with_nothing_left_stops() -> None:
    rows = [*_pool("good"), *[row | {"decodes": False} for row in _pool("bad")]]
    message = _stops(rows, LENIENT, good="finetune", bad="finetune")
    assert "batch `bad` (finetune): none of 60 images is accepted: decodes 60" in message


def test_a_delivery_of_known_images_stops() -> None:
    rows = [*_pool("old"), *[row | {"key": row["key"].replace("old", "new"), "batch": "new"} for row in _pool("old")]]
    message = _stops(rows, Validate(), old="finetune", new="finetune")
    counts = re.search(r"batch `new` \(finetune\): none of 60 images is accepted: (\w+) (\d+), (\w+) (\d+)\.", message)
    assert counts
    # Of the old test images that are delivered again, those that would now be trained on are more than duplicates.
    assert {counts[1], counts[3]} == {"no_exact_duplicate", "no_leak_of_test"} and int(counts[2]) + int(counts[4]) == 60


def test_a_missing_or_starved_class_stops() -> None:
    rows = [*_pool("b", classes="ab"), *_pool("b", 2, classes="c"), _image("b", "all", "d", "x.jpg", decodes=False)]
    message = _stops(rows, Validate(min_images_per_class=8), b="finetune")
    assert "validate.min_images_per_class" in message and "d has 0" in message and "c has" in message
    assert "a has" not in message


def test_an_unknown_finetune_class_stops_unless_allowed() -> None:
    rows = [*_pool("first"), *_pool("later", classes="abz"), *_pool("up", classes="xy")]
    roles = {"first": "finetune", "up": "pretrain", "later": "finetune"}
    message = _stops(rows, LENIENT, **roles)
    assert "batch `later` (finetune): new classes: z;" in message and "validate.allow_new_classes: true" in message
    assert "x" not in message.split("new classes:")[1].split(";")[0]
    assert _stops(rows, LENIENT.model_copy(update={"allow_new_classes": True}), **roles) == ""


def test_an_unlabelled_finetune_image_stops() -> None:
    message = _stops([*_pool("b"), _image("b", "all", "", "x.jpg")], LENIENT, b="finetune")
    assert "batch `b` (finetune): 1 images have no class" in message


def test_drift_is_recorded_and_stops_only_where_told_and_unexplained() -> None:
    dark = [row | {"brightness": 30.0} for row in _pool("dark", 60)]
    rows = [*_pool("first", 60), *dark]
    batches = _batches(first="finetune", dark="finetune")
    result = _judge(rows, batches)
    assert [row.fact for row in result.drift["dark"] if row.drifted] == ["brightness"]
    assert result.failed["no_drift"] == 1 and not result.stops
    strict = LENIENT.model_copy(update={"severity": Severities(no_drift="stop")})
    (message,) = _judge(rows, batches, strict).stops
    assert "brightness (KS distance 1.000)" in message and "batches.dark.accept_drift" in message
    batches["dark"] = batches["dark"].model_copy(update={"accept_drift": "night shots are wanted"})
    assert not _judge(rows, batches, strict).stops


# ------------------------------------------------------------------------------------------------ the stage itself


def _jpeg(seed: int, quality: int = 90) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((80, 64), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _deliver(role: str, batch: str, seeds: range, extra: dict[str, bytes]) -> None:
    """Raw tars and facts of a batch of two classes of real JPEGs; `extra` are more files of class a."""
    files = {
        f"all/{name}": {f"{seed}.jpg": _jpeg(seed) for seed in seeds if seed % 2 == number}
        | (extra if number == 0 else {})
        for number, name in enumerate("ab")
    }
    _pack(role, batch, files)


def _pack(role: str, batch: str, files: dict[str, dict[str, bytes]]) -> None:
    """Raw tars and facts of a batch: `<split>/<class>` → files by name."""
    folder = Path("data/raw") / role / batch
    rows = []
    for place, members in files.items():
        path = folder / f"{place}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for file, data in sorted(members.items()):
                info = tarfile.TarInfo(file)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        rows += scan_tar(path, folder, batch)
    write_table(pd.DataFrame(rows, columns=FACTS.names), FACTS, Path(f"data/facts/{role}/{batch}.parquet"))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one batch a role; `target` repeats an image of `up` and has a hostile file name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["validate"])
    _params(up="pretrain", target="finetune")
    _deliver(
        "pretrain", "up", range(40), {"copy.jpg": _jpeg(2, quality=60), "<script>alert(1)</script>.jpg": b"no image"}
    )
    _deliver("finetune", "target", range(100, 140), {"known.jpg": _jpeg(1), "cut.jpg": _jpeg(3)[:-300]})
    return tmp_path


def _params(max_quarantined: float = 0.1, **roles: str) -> None:
    batches = {name: {"role": role, "source": "somewhere"} for name, role in roles.items()}
    values = {"batches": batches, "split": {}, "validate": {"max_quarantined": max_quarantined}}
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _outputs(root: Path) -> dict[str, str]:
    made = ("data/accepted", "data/classes", "data/quarantine.parquet", "reports")
    files = [path for name in made for path in [root / name, *(root / name).rglob("*")] if path.is_file()]
    return {path.relative_to(root).as_posix(): sha256(path) for path in files}


def test_it_writes_what_the_design_says(workspace: Path) -> None:
    validate.main()
    assert sorted(_outputs(workspace)) == [
        "data/accepted/finetune/target.parquet",
        "data/accepted/pretrain/up.parquet",
        "data/classes/finetune.json",
        "data/classes/pretrain.json",
        "data/quarantine.parquet",
        "reports/validation.html",
        "reports/validation.json",
    ]
    bad = read_table(Path("data/quarantine.parquet"))
    assert bad.columns.tolist() == QUARANTINE.names
    assert bad[["key", "reason", "duplicate_of"]].to_numpy().tolist() == [
        ["up/all/a/<script>alert(1)</script>.jpg", "known_format", ""],
        ["up/all/a/copy.jpg", "no_near_duplicate", "up/all/a/2.jpg"],
        ["target/all/a/cut.jpg", "decodes", ""],
        ["target/all/a/known.jpg", "no_exact_duplicate", "up/all/b/1.jpg"],
    ]
    accepted = read_table(Path("data/accepted/finetune/target.parquet"))
    assert accepted.columns.tolist() == ACCEPTED.names
    assert accepted["key"].is_monotonic_increasing and len(accepted) == 40
    assert json.loads(Path("data/classes/finetune.json").read_text()) == ["a", "b"]
    report = json.loads(Path("reports/validation.json").read_text())
    assert (report["accepted"], report["quarantined"]) == (80, 4)
    assert report["batches"]["target"]["quarantined_by"] == {"decodes": 1, "no_exact_duplicate": 1}
    assert sum(report["classes"]["finetune"]["a"].values()) == 20


def test_the_report_has_what_ingest_understood_where_it_recorded_that(workspace: Path) -> None:
    account = {"images": 42, "understood": [["layout", "class <folders>"]], "odd": [], "titles": {"a": "A/B"}}
    Path("data/raw/finetune/target/source.json").write_text(json.dumps(account))
    validate.main()
    report = json.loads(Path("reports/validation.json").read_text())
    sources = {name: batch["source"] for name, batch in report["batches"].items()}
    assert sources == {"up": None, "target": {key: account[key] for key in ("images", "understood", "odd")}}
    page = Path("reports/validation.html").read_text()
    assert "class &lt;folders&gt;" in page and page.count("Not recorded: an older version ingested it.") == 1


def test_the_page_is_self_contained_and_escapes_hostile_names(workspace: Path) -> None:
    validate.main()
    page = Path("reports/validation.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page and str(workspace) not in page
    assert page.count("data:image/jpeg;base64,") >= 4  # both sides of both pairs
    assert "came in an earlier batch" in page


def test_the_same_inputs_give_the_same_bytes(workspace: Path) -> None:
    validate.main()
    first = _outputs(workspace)
    validate.main()
    assert _outputs(workspace) == first


def test_an_added_batch_leaves_the_older_ones_files_alone(workspace: Path) -> None:
    validate.main()
    first = _outputs(workspace)
    _params(up="pretrain", target="finetune", week1="finetune")
    _deliver("finetune", "week1", range(200, 240), {"known.jpg": _jpeg(100)})
    validate.main()
    second = _outputs(workspace)
    for name in first:
        if name.startswith(("data/accepted", "data/classes")):
            assert second[name] == first[name]
    assert read_table(Path("data/quarantine.parquet"))["key"].tolist()[-1] == "week1/all/a/known.jpg"


def test_what_a_vanished_batch_left_behind_is_removed(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    validate.main()
    for kind in ("shards/pretrain/up", "shards/finetune/target", "shards/pretrain/target"):
        (workspace / "data" / kind).mkdir(parents=True)
        (workspace / "data" / kind / "train-00000.tar").touch()
    for role in ("pretrain", "finetune"):
        (workspace / "data/shards" / role / ".gitkeep").touch()
    for name in ("ingest@up", "ingest@target", "finetune"):
        (workspace / ".synset/work" / name).mkdir(parents=True)
    _params(target="finetune")
    with caplog.at_level(logging.INFO):
        validate.main()
    work = sorted(path.name for path in (workspace / ".synset/work").iterdir())
    assert work == ["finetune", "ingest@target", "validate"]
    left = {path.relative_to(workspace / "data").as_posix() for path in (workspace / "data").rglob("*")}
    assert not {path for path in left if "/up" in path}
    assert {"shards/pretrain/.gitkeep", "shards/finetune/.gitkeep", "shards/finetune/target"} <= left
    assert {"raw/finetune/target", "facts/finetune/target.parquet"} <= left
    assert "shards/pretrain/target" not in left  # listed, but of the other role
    removed = [message for message in caplog.messages if "removing" in message]
    assert len(removed) == 6 and "removing data/raw/pretrain/up" in removed[1]
    assert json.loads(Path("data/classes/pretrain.json").read_text()) == []


def test_a_stop_writes_no_output_but_a_page_that_says_why(workspace: Path) -> None:
    _params(up="pretrain", target="finetune", max_quarantined=0.01)
    with pytest.raises(StageError) as stopped:
        validate.main()
    assert "validate.max_quarantined" in str(stopped.value)
    assert ".synset/validation-failed/validation.html" in str(stopped.value)
    assert _outputs(workspace) == {}
    assert "validate.max_quarantined" in Path(".synset/validation-failed/validation.html").read_text()
    assert json.loads(Path(".synset/validation-failed/validation.json").read_text())["stops"]


def test_a_batch_that_was_not_scanned_is_named(workspace: Path) -> None:
    _params(up="pretrain", target="finetune", later="finetune")
    with pytest.raises(StageError, match=r"data/facts/finetune/later.parquet is missing; `dvc repro scan@later`"):
        validate.main()


# ------------------------------------------------------------------------------------------------ planted faults


def _recoded(seed: int, quality: int, side: int = 80) -> bytes:
    image = Image.open(io.BytesIO(_jpeg(seed))).resize((side, side * 4 // 5))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _shaded(seed: int, factor: float, scale: int = 1) -> bytes:
    image = Image.open(io.BytesIO(_jpeg(seed))).point(lambda value: int(value * factor))
    buffer = io.BytesIO()
    image.resize((80 * scale, 64 * scale)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


PLANTED: dict[str, dict[str, dict[str, bytes]]] = {
    "no_leak_of_test": {"train/a": {"leak.jpg": _recoded(1000, 60), "bytes.jpg": _jpeg(1001)}},
    "varied_class": {"train/c": {f"{n:02d}.jpg": _recoded(3000, 40 + n, 70 + n) for n in range(30)}},
    "usual_brightness": {"train/a": {"dark.jpg": _shaded(3001, 0.12)}},
    "usual_resolution": {"train/b": {"huge.jpg": _shaded(3002, 1.0, scale=20)}},
    "balanced": {"train/few": {f"{n}.jpg": _jpeg(4000 + n) for n in range(4)}},
}
"""Expectation → what is added to the sound batch so that it fails: `<split>/<class>` → files."""


@pytest.mark.parametrize("name", ["", *PLANTED])
def test_a_planted_fault_is_found_under_its_name_and_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["validate"])
    _params(max_quarantined=0.5, up="pretrain")
    files = {f"train/{c}": {f"{n}.jpg": _jpeg(n + 500 * k) for n in range(50)} for k, c in enumerate("ab")}
    files["test/a"] = {f"{n}.jpg": _jpeg(n) for n in range(1000, 1020)}
    for place, more in PLANTED.get(name, {}).items():
        files[place] = files.get(place, {}) | more
    _pack("pretrain", "up", files)
    _allow_what_is_small()
    validate.main()
    report = json.loads(Path("reports/validation.json").read_text())
    failed = {each["name"] for each in report["expectations"] if each["failed"]}
    # Thirty copies are near-duplicates besides, and what is left of their class is small.
    also = {"no_near_duplicate", "balanced"} if name == "varied_class" else set()
    assert failed - also == ({name} if name else set())
    page = Path("reports/validation.html").read_text()
    bad = read_table(Path("data/quarantine.parquet")).set_index("key")[["reason", "duplicate_of"]]
    match name:
        case "no_leak_of_test":
            assert bad.to_dict("index") == {
                f"up/train/a/{copy}": {"reason": name, "duplicate_of": f"up/test/a/{stays}"}
                for copy, stays in (("leak.jpg", "1000.jpg"), ("bytes.jpg", "1001.jpg"))
            }
            assert "would have leaked into training" in page and "the same bytes" in page
        case "varied_class":
            (note,) = [note for note in report["notes"] if "one picture" in note]
            found = re.search(r": c (\d+) of 30$", note)
            assert found and int(found[1]) > 20
            assert f"{found[1]} of 30 images look alike" in page and page.count("data:image/jpeg") >= 8
        case "usual_brightness" | "usual_resolution":
            assert bad.empty and report["noted_by"] == {name: 1}
            assert f'id="{name}"' in page
        case "balanced":
            assert bad.empty and "few has" in report["notes"][0]


def _allow_what_is_small() -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["validate"]["min_images_per_class"] = 1
    values["split"]["val_fraction"] = 0.0  # or the one copy that stays may be none to train on
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
