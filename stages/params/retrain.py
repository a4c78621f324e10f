"""The section `retrain`: when fresh deliveries are looked for, and when they are reason enough to train."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Section


class Retrain(Section):
    """No stage reads this section: it decides when something runs, never what comes out."""

    base: Annotated[str, Field(min_length=1)] = "main"
    """The branch that people work on; merged into `branch` before every retraining."""
    branch: Annotated[str, Field(min_length=1)] = "retrain"
    """The branch that retraining commits to, and nobody else."""
    cron: Annotated[str, Field(min_length=1)] = "0 3 * * *"
    """When deliveries are looked for, in UTC."""
    min_images: Annotated[int, Field(ge=1)] = 1
    """Accepted training images in new batches from which retraining is due."""
    max_age_days: Annotated[float, Field(ge=0)] | None = 7
    """Anything new is reason enough once the last training is as old as this; null: never."""
    on_drift: bool = True
    """A new batch that drifts from the reference is reason enough."""
    retracted: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Batches taken back (`--retract`): a delivery of such a name is left alone, though it still lies there."""
    notify: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Who is told of verdicts, promotions, refusals and failures: Apprise URLs, or Prefect blocks as
    `block:TYPE/NAME`; `$NAME` in one stands for that environment variable, so that no secret need be committed."""
