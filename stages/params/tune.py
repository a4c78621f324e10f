"""The section `tune`: what `python -m pipelines.tune` searches, for how long, and by which metric on val."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.runtime.params_file import Count, Section, Seed

SEARCHED = ("model", "finetune", "training")
"""Sections whose keys may be searched: a trial depends on these, on the data and on the backbone."""
OF_BACKBONE = ("model.architecture", "model.stem")
Number = int | float


class Distribution(Section):
    """The values of a key: `choices`, or a range from `low` to `high`."""

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    """Logarithmic: each order of magnitude is equally likely; for learning rates."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Only low, low + step, ...; if both ends are whole numbers, so are the values."""
    choices: list[Any] | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("expected `choices`, or `low` and `high`")
        if self.choices is not None and (not self.choices or self.log or {self.low, self.high, self.step} != {None}):
            raise ValueError("`choices` must name one at least, and go without `low`, `high`, `step` and `log`")
        if self.low is not None and self.high is not None:
            if self.low > self.high:
                raise ValueError(f"`low` ({self.low}) is above `high` ({self.high})")
            if isinstance(self.low, int) and isinstance(self.high, int) and self.step and int(self.step) != self.step:
                raise ValueError(f"`step` ({self.step}) must be a whole number where both ends are, as in 1 and 8")
            if self.log and (self.low <= 0 or self.step is not None):
                raise ValueError("`log` needs `low` above 0, and no `step`")
        return self


class Tune(Section):
    """No stage reads this section; a search writes its best trial as a params file."""

    trials: Count = 20
    metric: Literal["val_loss", "val_top1", "val_robust_top1"] = "val_loss"
    """Measured on val, of the weights that a trial saves: the last epoch's, or with `patience` the best epoch's."""
    prune_after: Count | None = 3
    """Median pruning: from this epoch on, a trial stops if its best epoch so far is worse than the median of at least
    three others up to the same epoch. Null: no pruning. Never where `finetune.epochs` is searched: at the same epoch a
    short training is nearer to its end than a long one."""
    seed: Seed = 1
    space: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted key -> values: `finetune.lr: {low: 0.01, high: 0.1}`."""

    @property
    def maximises(self) -> bool:
        """Whether a higher `metric` is better."""
        return self.metric != "val_loss"

    @model_validator(mode="after")
    def _may_be_searched(self) -> Self:
        for key in self.space:
            if key.split(".")[0] not in SEARCHED or "." not in key:
                raise ValueError(f"`{key}` cannot be searched: a key of {', '.join(SEARCHED)} can, as `finetune.lr`")
            if key in OF_BACKBONE:
                raise ValueError(f"`{key}` cannot be searched: it is the backbone's too, from which every trial starts")
        return self
