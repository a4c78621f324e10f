"""The table of expectations: what must hold for images, batches, classes and drift, and the message where it does not.

`great_expectations.py` checks it and `words.py` fills in the messages. A new row needs a key in `Severities`
(stages/params/validate.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from stages.params.validate import Severity, Validate

Step = Literal["image", "outlier", "duplicate", "batch", "batch class", "class", "group", "drift"]
"""What the rows of the checked table are. Images are judged in three steps: each alone, sound ones as outliers of their
batch, sound ones as duplicates."""
CONFLICT, LEAK, EXACT, NEAR = "no_label_conflict", "no_leak_of_test", "no_exact_duplicate", "no_near_duplicate"

Check = tuple[str, dict[str, Any]]
"""A Great Expectations class and its keywords."""


def at_least(limit: float) -> Check:
    """A number from `limit` on."""
    return "ExpectColumnValuesToBeBetween", {"min_value": limit}


def at_most(limit: float) -> Check:
    """A number up to `limit`."""
    return "ExpectColumnValuesToBeBetween", {"max_value": limit}


def one_of(*values: object) -> Check:
    """One of these values."""
    return "ExpectColumnValuesToBeInSet", {"value_set": list(values)}


def none() -> Check:
    """No value at all."""
    return "ExpectColumnValuesToBeNull", {}


class Message(NamedTuple):
    """What to tell a person about rows that fail: templates for `str.format`.

    They may name the columns of the table, and `where` (batch and role), `limit`, `parameter`, `rows` (how many fail),
    `classes_have`, `items` (the first failing rows, each as `item`) and `worst` (reasons and first files of a batch).
    """

    per: str
    """One message for all rows with the same value in this column."""
    text: str
    item: str = ""
    remedy: str = ""
    """Added where the severity is `stop`, as only then somebody has to do something."""
    only: str = ""
    """A pandas query: other rows have a message of another expectation."""


@dataclass(frozen=True)
class Expectation:
    """A row of the table."""

    step: Step
    severity: Severity
    name: str
    column: str
    check: Check
    parameter: str
    """The key of params.yaml that sets the limit; empty where there is none."""
    reason: str
    """Why a person should care when it fails, in plain words."""
    fault: str = ""
    """What to call images that fail it; empty where the rows are no images."""
    message: Message | None = None
    """None where the rows are images: the page shows them."""

    @property
    def scope(self) -> str:
        """The step as reports name it: all three steps of images are `image`."""
        return "image" if self.step in ("outlier", "duplicate") else self.step

    @property
    def loosened_by(self) -> str:
        """What to set so that fewer images are quarantined by it, for people."""
        if self.name == "decodes":
            return "no parameter, as such files cannot be read"
        if self.name in (CONFLICT, NEAR):
            less = f"a smaller `{self.parameter}`, or `validate.near_duplicate_distance: null`"
            return less if self.name == NEAR else f"other labels, or where the pictures differ {less},"
        return f"`{self.parameter}`" if self.parameter else f"`validate.severity.{self.name}: note`"

    @property
    def limit(self) -> str:
        """What is demanded of the column, for people: `≥ 16`, `JPEG, PNG`, `none`."""
        _, arguments = self.check
        match arguments:
            case {"value_set": values}:
                return ", ".join({True: "yes", False: "no"}.get(value, str(value)) for value in values)
            case {"min_value": limit}:
                return f"≥ {limit:,.10g}"
            case {"max_value": limit}:
                return f"≤ {limit:,.10g}"
        return "none"


def expectations(limits: Validate, *steps: Step) -> list[Expectation]:
    """The rows of `steps` (default: all), in the order in which they are checked.

    An image that fails several is named after the first: a text file does not decode either, but "not an image" tells
    more. Outliers are told within their own batch, and duplicates by images that came before, so that no later batch
    changes what was said.
    """
    image, outlier, duplicate = (_rows_of(step, limits) for step in ("image", "outlier", "duplicate"))
    batch, varied, of_class, drift = (_rows_of(step, limits) for step in ("batch", "batch class", "class", "drift"))
    group = _rows_of("group", limits)
    table = [
        image("not_empty", "bytes", at_least(1), "", fault="empty files",
              reason="The file has no bytes at all."),
        image("known_format", "format", one_of(*limits.formats), "validate.formats", fault="not images",
              reason="Its first bytes are of no image format that we read, whatever its name."),
        image("sane_size", "pixels", at_most(limits.max_pixels), "validate.max_pixels", fault="too many pixels",
              reason="So many pixels that decoding it could take the machine down."),
        image("decodes", "decodes", one_of(True), "", fault="damaged",
              reason="It does not decode to its last byte. A loader would crash on it, or train on grey."),
        image("large_enough", "short_side", at_least(limits.min_side), "validate.min_side", fault="too small",
              reason="Too few pixels on its shorter side to show anything."),
        image("sane_aspect", "aspect", at_most(limits.max_aspect), "validate.max_aspect", fault="too narrow",
              reason="So long and narrow that a square crop shows almost nothing of it."),
        image("not_flat", "contrast", at_least(limits.min_contrast), "validate.min_contrast", fault="one flat colour",
              reason="One flat colour: nothing to learn from."),
        outlier("usual_resolution", "resolution_outlying", at_most(limits.outliers.resolution or 0),
                "validate.outliers.resolution", fault="of unusual resolution",
                reason="Far more or far fewer pixels than its batch has: a thumbnail, a scan, a picture from another "
                       "source."),
        outlier("usual_brightness", "brightness_outlying", at_most(limits.outliers.brightness or 0),
                "validate.outliers.brightness", fault="unusually dark or bright",
                reason="Far darker or brighter than its batch: a shot at night, a document, a broken exposure."),
        duplicate(CONFLICT, "conflict_with", none(), "validate.near_duplicate_local",
                  fault="conflicts of labels",
                  reason="The same picture as one with another class, in its batch or an earlier one of its role: one "
                         "of the two labels is wrong, and nothing says which. Within a batch all of them stay out."),
        duplicate(LEAK, "leak_of", none(), "validate.near_duplicate_distance", fault="leaks of test images into train",
                  reason="An image of train is the same picture as one of test, fresh or val that stays: the score "
                         "would count what was learnt by heart."),
        duplicate(EXACT, "duplicate_of", none(), "", fault="exact duplicates",
                  reason="The same bytes as an image that stays: it would count twice, or test what was trained on."),
        duplicate(NEAR, "near_duplicate_of", none(), "validate.near_duplicate_local", fault="near-duplicates",
                  reason="The same picture as an image that stays (resized, recoded, brightened); confirmed on "
                         "pixels."),
        batch("some_accepted", "accepted", at_least(1), "",
              reason="A batch of which nothing is left brings nothing.",
              message=Message("batch", "{where}: none of {images} images is accepted{worst}")),
        batch("few_quarantined", "share_quarantined", at_most(limits.max_quarantined), "validate.max_quarantined",
              reason="So much of a batch is bad that something went wrong before it came here.",
              message=Message("batch", "{where}: {share_quarantined:.1%} are quarantined, {quarantined:,} of "
                                       "{images:,} images ({limit}, {parameter}){worst}", only="accepted > 0",
                              remedy="{most}")),
        batch("labelled", "unlabelled", at_most(0), "",
              reason="Fine-tuning learns from labels; an image without one is of no use to it.",
              message=Message("batch", "{where}: {unlabelled:,} images have no class; label them, or leave them out: "
                                       "`?unlabelled=skip` after the source")),
        batch("some_to_test", "test", at_least(1), "",
              reason="Without a test image a model could be trained, but not evaluated.",
              message=Message("batch", "{where}: no accepted image is in test, so no model could be evaluated; bring a "
                                       "test split, raise split.test_fraction, or, if a pretrain batch has all its "
                                       "groups, put this batch before that one", only="accepted > 0")),
        batch("sequences_grouped", "frames", at_most(0), "",
              reason="Names and looks say that these are frames of sequences. Without groups, frames that hardly "
                     "differ fall on both sides of a split, and the score counts what was learnt by heart.",
              message=Message("batch", "{where}: {frames:,} images look like frames of {sequences:.0f} sequences, and "
                                       "no group is given, so neighbours are in different splits: {first} and {second} "
                                       "(neighbours differ by {apart:.0f} of 64 bits, any two by "
                                       "{apart_by_chance:.0f}). {advice}")),
        varied("varied_class", "share_alike", at_most(limits.collapse.max_share), "validate.collapse",
               reason="So many images of a class are one picture, or look like it, that its label is in doubt: a "
                      "placeholder, a video, the wrong folder.",
               message=Message("batch", "{where}: classes of which too many images are one picture, or look like it "
                                        "({limit}, {parameter}.max_share): {items}",
                               item="{class_name} {alike:,} of {images:,}")),
        of_class("enough_to_train", "train", at_least(limits.min_images_per_class), "validate.min_images_per_class",
                 reason="A class that training hardly sees will never be predicted.",
                 message=Message("role", "{role}: too few accepted training images ({limit}, {parameter}) of {rows} "
                                         "classes: {items}", item="{class_name} has {train}")),
        of_class("enough_to_test", "held_out", at_least(1), "",
                 reason="A class without an image in test is not judged, neither by the score nor by the gate; without "
                        "one in val it has no say in when training stops.",
                 message=Message("role", "{role}: no accepted image in test, or none in val, of {rows} classes: "
                                         "{items}. The gate judges no class that has none in test",
                                 item="{class_name} (test {test}, val {val}, train {train})")),
        of_class("balanced", "imbalance", at_most(limits.max_imbalance), "validate.max_imbalance",
                 reason="The largest class has so many times its training images that it is seldom predicted.",
                 message=Message("role", "{role}: {classes_have} so few training images that the largest has too many "
                                         "times as many ({limit}, {parameter}): {items}",
                                 item="{class_name} has {train:,} of {largest:,}")),
        of_class("known_class", "new_in", none(), "validate.allow_new_classes",
                 reason="A later batch brings a class that the target task does not have: a new one, or a misspelt "
                        "folder.",
                 message=Message("new_in", "batch `{new_in}` (finetune): new classes: {items}", item="{class_name}",
                                 remedy="; rename the folders, or let them in by {parameter}: true")),
        group("whole_groups", "sides", at_most(1), "",
              reason="Images that belong together (one patient, product or video) stand on two sides of a split: the "
                     "score counts what was learnt by heart.",
              message=Message("role", "{role}: images of {rows} groups are on two sides of a split: {items}",
                              item="{group} ({where})",
                              remedy=". Divide the source by groups, or bring it without split folders; a finetune "
                                     "batch that stands before a pretrain batch in params.yaml keeps its groups out of "
                                     "that; or accept it: validate.severity.whole_groups: note")),
        drift("no_drift", "unexplained", one_of(False), "validate.drift",
              reason="The batch looks different from all that came before it in its role.",
              message=Message("batch", "{where}: drifts from the earlier ones in {items}",
                              item="{fact} (KS distance {distance:.3f})",
                              remedy="; give the reason as batches.{batch}.accept_drift, or only note it "
                                     "(validate.severity.no_drift: note; limits: {parameter})")),
    ]  # fmt: skip
    off = {
        "usual_resolution": limits.outliers.resolution is None,
        "usual_brightness": limits.outliers.brightness is None,
        "known_class": limits.allow_new_classes,
    }
    return [row for row in table if not off.get(row.name) and (row.step in steps or not steps)]


def _rows_of(step: Step, limits: Validate) -> Callable[..., Expectation]:
    def row(name: str, *columns: Any, **more: Any) -> Expectation:
        return Expectation(step, getattr(limits.severity, name), name, *columns, **more)

    return row
