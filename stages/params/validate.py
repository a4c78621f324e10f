"""The section `validate`: what an image, a class, a batch and the whole must be like."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.load import Section

Share = Annotated[float, Field(ge=0, le=1)]
Format = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]


class Drift(Section):
    """A batch against all earlier ones of its role: a two-sample Kolmogorov-Smirnov test per fact."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    min_effect: Share = 0.1
    """The KS distance below which a significant difference is not called drift: large batches always differ."""
    stop: bool = False
    """Stop on drift, unless the batch has `accept_drift`."""


class Validate(Section):
    """Row-level limits quarantine an image, table-level ones stop the run."""

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
    allow_new_classes: bool = False
    """Let a later finetune batch bring classes that earlier ones did not have."""
    drift: Drift = Drift()
