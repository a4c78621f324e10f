"""A cron expression means the same to everybody, and fires: what ours takes, Prefect's croniter executes as it says."""

import random
from datetime import UTC, datetime

import pytest
from prefect._vendor.croniter import croniter

from stages.params.cron import SHORT, checked_cron
from stages.params.retrain import Retrain
from stages.runtime.params_file import ParamsError, check

NOW = datetime(2026, 12, 1, tzinfo=UTC)


def next_runs(expression: str, count: int = 2) -> list[datetime]:
    """When croniter fires."""
    schedule = croniter(expression, NOW)
    return [schedule.get_next(datetime) for _ in range(count)]


@pytest.mark.parametrize(
    "expression",
    ["0 3 * * *", "*/15 * * * *", "0 3 * * MON-fri", "0 3 * * sat-sun", "5,35 1-23/2 1,15 jan-jun *", "0 3 29 2 *",
     "0  3\t* * 7 ", "0 3 1 * mon", "* * * * *", *SHORT],
)  # fmt: skip
def test_what_every_cron_takes_is_taken_and_fires(expression: str) -> None:
    assert checked_cron(expression) == expression
    assert all((run - NOW).days <= 8 * 366 for run in next_runs(expression))


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("0 3 * * * *", "not 6; there are no seconds"),
        ("0 0 3 * * * 2027", "not 7; there are no seconds, and no years"),
        ("0 3 * *", "not 4"),
        ("every night", "expected 5 fields"),
        ("", "not 0"),
        ("0 3 30 2 *", "never fires: no year has day 30 in month 2"),
        ("0 3 31 4,6,9,11 *", "never fires"),
        ("0 3 30-31 feb mon", "never fires"),
        ("60 3 * * *", "minute is '60', and goes from 0 to 59"),
        ("0 24 * * *", "hour"),
        ("0 3 0 * *", "day is '0', and goes from 1"),
        ("0 3 * 13 *", "month"),
        ("*/0 * * * *", "a step is 1 or more"),
        ("*/70 * * * *", "no longer than what it divides"),
        ("5/15 * * * *", "write where the steps end: 5-59/15"),
        ("0 3 8-8 * *", "ends after it begins"),
        ("0 22-2 * * *", "ends after it begins"),
        ("0 3 */2 * mon", "some readers take both, others either"),
        ("0 3 L * *", "expected \\*, numbers"),
        ("0 3 * * 5#2", "expected \\*"),
        ("0 3 * * R", "expected \\*"),
        ("0 3 ? * *", "expected \\*"),
        ("0 3 * monday *", "expected \\*"),
        ("0 3 * mon *", "month has 'mon'; expected a number, jan, feb"),
        ("0 3 *,1 * *", "expected \\*"),
        ("-1 3 * * *", "expected \\*"),
        ("٣ 3 * * *", "expected \\*"),
        ("@reboot", "expected 5 fields"),
    ],
)
def test_what_means_two_things_or_never_fires_is_refused(expression: str, words: str) -> None:
    with pytest.raises(ParamsError, match=rf"`retrain\.cron`: .*{words}"):
        check("retrain", {"cron": expression}, Retrain)


def test_croniter_fires_on_everything_that_is_taken() -> None:
    draw, taken = random.Random(1), 0
    for _ in range(2000):
        fields = []
        for low, high in ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7)):
            a, b = draw.randint(low, high), draw.randint(low, high)
            fields.append(draw.choice(["*", str(a), f"{a},{b}", f"{a}-{b}", f"*/{b}", f"{a}-{b}/{b}"]))
        try:
            expression = checked_cron(" ".join(fields))
        except ValueError:
            continue
        taken += 1
        assert (next_runs(expression)[1] - NOW).days <= 16 * 366, expression
    assert taken > 100
