"""The section `retrain`: when to look for new deliveries, and when to train on them."""

from typing import Annotated

from pydantic import AfterValidator, Field

from stages.params.cron import checked_cron
from stages.runtime.params_file import AtLeastZero, Count, NonEmpty, Section


class Retrain(Section):
    """No stage reads this section: it decides when something runs, not what comes out."""

    base: NonEmpty = "main"
    """The branch that people work on; merged into `branch` before every retraining."""
    branch: NonEmpty = "retrain"
    """The branch that only retraining commits to."""
    cron: Annotated[str, AfterValidator(checked_cron)] = "0 3 * * *"
    """When to look for deliveries, in UTC: minute, hour, day, month, weekday."""
    min_images: Count = 1
    """Retraining is due from this many accepted training images in new batches."""
    max_age_days: AtLeastZero | None = 7
    """Retraining is due for any new image once the last training is this old; null: never for that reason."""
    on_drift: bool = True
    """Retraining is due when a new batch drifts from the reference."""
    retracted: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Batches taken back (`--retract`): a delivery of such a name is ignored even if it is still there."""
    notify: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Whom to notify of verdicts, promotions, refusals and failures: Apprise URLs, or Prefect blocks as
    `block:TYPE/NAME`. `$NAME` in one stands for that environment variable, so no secret needs to be committed."""
