"""The section `validate`: what an image, a class, a batch and the whole must be like."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stages.runtime.params_file import Section

Share = Annotated[float, Field(ge=0, le=1)]
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
    """What follows where an expectation fails: a key for each in stages/data/validation/expectations.py.

    `quarantine`: the image stays out. `stop`: nothing is written but why. `note`: counted and shown on the page.
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
    no_leak_of_test: OfImages = "quarantine"
    no_exact_duplicate: OfImages = "quarantine"
    no_near_duplicate: OfImages = "quarantine"
    some_accepted: Annotated[Severity, _only("stop", why="an empty batch cannot be sharded")] = "stop"
    few_quarantined: OfTables = "stop"
    labelled: Annotated[Severity, _only("stop", why="fine-tuning cannot do without labels")] = "stop"
    varied_class: OfTables = "note"
    enough_to_train: OfTables = "stop"
    balanced: OfTables = "note"
    known_class: OfTables = "stop"
    no_drift: OfTables = "note"


class Outliers(Section):
    """How far beyond the middle half of its own batch an image may lie, in widths of that half; null: any distance."""

    resolution: Annotated[float, Field(gt=0)] | None = 3.0
    """Of the logarithm of width times height. The middle half counts as one octave wide at least."""
    brightness: Annotated[float, Field(gt=0)] | None = 2.0
    """Of mean luminance. The middle half counts as 16 of 255 levels wide at least. At 2, about one in a hundred of
    Imagenette and Tiny ImageNet is noted; at 2.5 hardly anything could be too dark."""


class Collapse(Section):
    """When the images of a class look like one picture under one name: a placeholder, a video, a folder mixed up."""

    max_share: Share = 0.15
    """Of the images of a class in a batch: so many may be one picture, or have one perceptual hash. In Imagenette and
    Tiny ImageNet it is 0.005 at most."""
    min_images: Annotated[int, Field(ge=2)] = 20
    """Smaller classes are not judged."""


class Drift(Section):
    """A batch against all earlier ones of its role: a two-sample Kolmogorov-Smirnov test per fact."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    min_effect: Share = 0.1
    """The KS distance below which a significant difference is not called drift: large batches always differ."""
    stop: bool = False
    """The same as `severity.no_drift: stop`: stop on drift, unless the batch has `accept_drift`."""


class Validate(Section):
    """Limits, and what follows where one is not kept."""

    formats: Annotated[tuple[Format, ...], Field(min_length=1, strict=False)] = ("JPEG", "PNG", "WEBP", "BMP")
    """By magic number; what a file is called does not count."""
    min_side: Annotated[int, Field(ge=1)] = 16
    """Of the shorter side, in pixels."""
    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Width times height: above it a file may be a decompression bomb."""
    max_aspect: Annotated[float, Field(ge=1)] = 10
    """Longer side over shorter side."""
    min_contrast: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of luminance (0-255): below it the image is one flat colour."""
    near_duplicate_distance: Annotated[int, Field(ge=0, le=8)] | None = 6
    """Hamming distance of two 64-bit perceptual hashes up to which two images are compared on pixels; null: none are.

    Beyond 8 unrelated pictures come within reach, and the search for pairs takes hours at a million images.
    """
    near_duplicate_difference: Annotated[float, Field(ge=0)] = 12.0
    """Mean absolute difference (0-255) of 32x32 luminance thumbnails up to which two images can be the same picture."""
    near_duplicate_correlation: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Correlation of these thumbnails from which they are. On ImageNet, recoded, resized (to a quarter) and brightened
    copies lie above 0.96, and the most alike of different pictures below 0.93."""
    max_quarantined: Share = 0.1
    """Of any batch."""
    min_images_per_class: Annotated[int, Field(ge=1)] = 5
    """Accepted training images of every class, over all batches of a role."""
    max_imbalance: Annotated[float, Field(ge=1)] = 10.0
    """How many times the training images of a class the largest class of its role may have."""
    outliers: Outliers = Outliers()
    collapse: Collapse = Collapse()
    allow_new_classes: bool = False
    """Let a later finetune batch bring classes that earlier ones did not have."""
    drift: Drift = Drift()
    severity: Severities = Severities()
