"""The section `validate`: what an image, a class and a batch must be like, and what follows if one is not."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from stages.runtime.params_file import AtLeastZero, Count, Positive, Section, Share

Format = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
Severity = Literal["quarantine", "note", "stop"]


def _only(*allowed: Severity, why: str) -> AfterValidator:
    def check(severity: Severity) -> Severity:
        if severity not in allowed:
            raise ValueError(f"expected {' or '.join(allowed)} ({why})")
        return severity

    return AfterValidator(check)


_images = _only("quarantine", "note", why="it is of single images, and one image is no reason to stop")
_tables = _only("stop", "note", why="it is of a batch or a class, and there is no single image to quarantine")
OfImages = Annotated[Severity, _images]
OfTables = Annotated[Severity, _tables]


class Severities(Section):
    """What follows if an expectation fails; a key for each expectation of stages/data/validation/expectations.py.

    `quarantine`: the image stays out. `stop`: only the reason is written. `note`: counted and shown on the page.
    """

    not_empty: OfImages = "quarantine"
    known_format: OfImages = "quarantine"
    sane_size: OfImages = "quarantine"
    decodes: Annotated[
        Severity, _only("quarantine", why="training and sharding fail at an image that does not decode")
    ] = "quarantine"
    large_enough: OfImages = "quarantine"
    sane_aspect: OfImages = "quarantine"
    not_flat: OfImages = "quarantine"
    usual_resolution: OfImages = "note"
    usual_brightness: OfImages = "note"
    no_label_conflict: OfImages = "quarantine"
    no_leak_of_test: OfImages = "quarantine"
    no_exact_duplicate: OfImages = "quarantine"
    no_near_duplicate: OfImages = "quarantine"
    some_accepted: Annotated[Severity, _only("stop", why="an empty batch cannot be sharded")] = "stop"
    few_quarantined: OfTables = "stop"
    labelled: Annotated[Severity, _only("stop", why="fine-tuning cannot do without labels")] = "stop"
    some_to_test: Annotated[Severity, _only("stop", why="nothing could be evaluated")] = "stop"
    sequences_grouped: OfTables = "note"
    varied_class: OfTables = "note"
    enough_to_train: OfTables = "stop"
    enough_to_test: OfTables = "note"
    balanced: OfTables = "note"
    known_class: OfTables = "stop"
    whole_groups: OfTables = "stop"
    no_drift: OfTables = "note"


class Outliers(Section):
    """How far outside the middle half of its batch an image may lie, in widths of that half; null: any distance."""

    resolution: Positive | None = 3.0
    """Of the logarithm of width times height; the middle half counts as at least one octave wide."""
    brightness: Positive | None = 2.0
    """Of mean luminance; the middle half counts as at least 16 of 255 levels wide. At 2, about 1 % of Imagenette and
    Tiny ImageNet is noted; at 2.5 hardly any image could be too dark."""


class Collapse(Section):
    """When the images of a class look like one picture: a placeholder, a video, a wrong folder."""

    max_share: Share = 0.15
    """Maximum share of a class in a batch that is one picture or has one perceptual hash. In Imagenette and Tiny
    ImageNet it is at most 0.005."""
    min_images: Annotated[int, Field(ge=2)] = 20
    """Smaller classes are not judged."""


class Drift(Section):
    """A batch against all earlier ones of its role: a two-sample Kolmogorov-Smirnov test per fact."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    min_effect: Share = 0.1
    """Below this KS distance even a significant difference is no drift: large batches always differ."""

    @model_validator(mode="before")
    @classmethod
    def _stop_is_a_severity(cls, values: Any) -> Any:
        if isinstance(values, dict) and "stop" in values:
            raise ValueError("there is no `stop` any more; set `validate.severity.no_drift` to `stop` or `note`")
        return values


class Validate(Section):
    """Limits, and what follows if one is exceeded."""

    formats: Annotated[tuple[Format, ...], Field(min_length=1, strict=False)] = ("JPEG", "PNG", "WEBP", "BMP")
    """By magic number; the name of a file does not count."""
    min_side: Count = 16
    """Of the shorter side, in pixels."""
    max_pixels: Count = 178_956_970
    """Maximum of width times height; a larger file may be a decompression bomb."""
    max_aspect: Annotated[float, Field(ge=1)] = 10
    """Longer side over shorter side."""
    min_contrast: AtLeastZero = 1.0
    """Minimum standard deviation of luminance (0-255); an image below it is one flat colour."""
    near_duplicate_distance: Annotated[int, Field(ge=0, le=8)] | None = 6
    """Two images are compared on pixels up to this Hamming distance of their 64-bit perceptual hashes; null: never.

    Above 8, unrelated pictures are compared, and the search for pairs takes hours at a million images.
    """
    near_duplicate_difference: AtLeastZero = 12.0
    """Two images are one picture only up to this mean absolute difference (0-255) of 32x32 luminance thumbnails."""
    near_duplicate_correlation: Share = 0.95
    """And only from this correlation of the thumbnails on. On ImageNet, recoded, resized (to a quarter) and brightened
    copies lie above 0.96, the most similar pair of different pictures below 0.93."""
    near_duplicate_local: Positive | None = 10.0
    """And only if no place (a 32nd of the side, both ways) differs by more than so many levels where it is even, three
    times as many along edges, and grain is shared: two photographs of one scene are two pictures. null: not asked.

    Measured by `python -m bench.near_duplicates_local`; docs/decisions.md has the error rates.
    """
    max_quarantined: Share = 0.1
    """Maximum share of a batch."""
    min_images_per_class: Count = 5
    """Minimum number of accepted training images of every class, over all batches of a role."""
    max_imbalance: Annotated[float, Field(ge=1)] = 10.0
    """Maximum ratio of training images between the largest class of a role and any other."""
    outliers: Outliers = Outliers()
    collapse: Collapse = Collapse()
    allow_new_classes: bool = False
    """A later finetune batch may bring classes that earlier ones did not have."""
    drift: Drift = Drift()
    severity: Severities = Severities()
