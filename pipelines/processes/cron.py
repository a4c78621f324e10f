"""Whether Prefect takes a cron expression; apart from the flows, so that a broken one keeps no server from starting."""

from pipelines import environment
from stages.runtime.command import StageError

environment.apply()  # Prefect reads its settings when it is imported

from prefect.client.schemas.schedules import CronSchedule  # noqa: E402


def checked_cron(expression: str) -> str:
    """The expression itself.

    Raises:
        StageError: Prefect does not take it.
    """
    try:
        CronSchedule(cron=expression, timezone="UTC")
    except ValueError:
        raise StageError(
            f"params.yaml: `retrain.cron`: expected minute, hour, day, month and weekday, as in '0 3 * * *', "
            f"got {expression!r}"
        ) from None
    return expression
