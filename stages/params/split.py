"""The section `split`: which accepted images are train, val, test and fresh."""

from stages.runtime.params_file import Fraction, Section


class Split(Section):
    """Shares of images. They are chosen by content hash, so an image never changes its split."""

    val_fraction: Fraction = 0.1
    """Share of train that becomes val, if the source has no val besides a test."""
    test_fraction: Fraction = 0.2
    """Share that becomes test, if the source has no splits or only train."""
    fresh_fraction: Fraction = 0.2
    """Share of a later finetune batch that becomes its holdout `fresh`, whatever its own splits."""
