"""The section `tune`: what `python -m pipelines.tune` searches, how long, and by which figure of val."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.runtime.params_file import Section

SEARCHED = ("model", "finetune", "training")
"""Sections whose keys may be searched: what a trial depends on besides data and backbone."""
OF_BACKBONE = ("model.architecture", "model.stem")
Number = int | float


class Distribution(Section):
    """Values that a key may have: `choices`, or everything from `low` to `high`."""

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    """Each order of magnitude as likely as the next; for rates."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Only low, low + step, ...; whole numbers at both ends give whole numbers."""
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
    """No stage reads this section: the best trial becomes a params file of its own."""

    trials: Annotated[int, Field(ge=1)] = 20
    metric: Literal["val_loss", "val_top1", "val_robust_top1"] = "val_loss"
    """Of the weights that a trial keeps: the last epoch's, or under `patience` the best one's. Never one of test."""
    prune_after: Annotated[int, Field(ge=1)] | None = 3
    """From this epoch on, a trial is stopped whose best epoch so far is worse than the median of three or more others
    up to the same epoch. Null: all are trained to their end, and so they are where `finetune.epochs` is searched:
    at one epoch a short training is nearer to its end than a long one."""
    seed: Annotated[int, Field(ge=0)] = 1
    space: dict[str, Distribution] = Field(default_factory=dict)
    """By dotted key: `finetune.lr`."""

    @property
    def maximises(self) -> bool:
        """Whether more of `metric` is better."""
        return self.metric != "val_loss"

    @model_validator(mode="after")
    def _may_be_searched(self) -> Self:
        for key in self.space:
            if key.split(".")[0] not in SEARCHED or "." not in key:
                raise ValueError(f"`{key}` cannot be searched: a key of {', '.join(SEARCHED)} can, as `finetune.lr`")
            if key in OF_BACKBONE:
                raise ValueError(f"`{key}` cannot be searched: it is the backbone's too, from which every trial starts")
        return self
