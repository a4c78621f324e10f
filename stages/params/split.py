"""The section `split`: which accepted images are for training, for choosing and for the final word."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Section

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Split(Section):
    """Fractions are of images, chosen by content hash, so that an image stays on its side for ever."""

    val_fraction: Fraction = 0.1
    """Of train, where the source has no val beside a test."""
    test_fraction: Fraction = 0.2
    """Of a source that is one pool of classes (or has train only)."""
    fresh_fraction: Fraction = 0.2
    """Of a later finetune batch, whatever its own splits: its holdout `fresh`."""
