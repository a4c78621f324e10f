"""What reconcile tells, and how it asks for an examination; what it decides is in promotion/test_promotion.py."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines import reconcile
from pipelines.environment import ROOT
from pipelines.promotion.examination import examine
from pipelines.promotion.promotion import Outcome
from stages.registry.examination import Examination
from stages.registry.versions import Version
from stages.runtime.command import StageError

VERSION = Version("bells", 7, "", "", {}, (), "", 0)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Title and text of every notification."""
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr(reconcile, "tell", lambda title, body: sent.append((title, body)))
    monkeypatch.setattr(reconcile, "folder", lambda name: tmp_path / name)
    monkeypatch.setattr(reconcile, "create_markdown_artifact", lambda **_: None)
    return sent


def test_a_failure_is_told_once_and_again_when_it_is_another(told: list[tuple[str, str]]) -> None:
    for message in ("refused", "refused", "refused", "no space", "no space"):
        reconcile._tell_failure(message)
    assert [body.splitlines()[0] for _, body in told] == ["refused", "no space"]


def test_a_disk_that_fails_before_anything_else_is_told_too(
    told: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reconcile, "clear_after_kill", full)
    monkeypatch.setattr(reconcile, "get_run_logger", lambda: None)
    with pytest.raises(OSError, match="No space"):
        reconcile.reconcile.fn()
    assert [title for title, _ in told] == ["reconcile failed"]


def test_an_outcome_is_told_with_a_link_where_there_is_a_server(
    told: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome("promoted", "bells: version 7 is in force (passed)", 7)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    reconcile._tell("bells", outcome)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000/")
    reconcile._tell("bells", outcome)
    title = "bells: version 7 promoted"
    link = "[its page](http://127.0.0.1:5000/#/models/bells/versions/7)"
    assert told == [(title, f"{outcome.message}\n"), (title, f"{outcome.message}\n\n{link}\n")]


@pytest.mark.parametrize("against", ["", "none", "3"])
def test_the_examination_is_asked_in_a_process_of_its_own(against: str) -> None:
    asked: list[list[str]] = []

    def run(command: Sequence[str]) -> None:
        asked.append(list(command))
        found = {"sound": False, "gate": "failed", "retaken": True, "reasons": ["damaged"]}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(found))

    assert examine(VERSION, against, run) == Examination(False, "failed", True, ("damaged",))
    (command,) = asked
    assert command[:5] == [sys.executable, "-m", "stages.examine", "bells", "7"]
    data = ["--data", str(ROOT / ".synset/retrain/tree")]  # where the newest version's shards are
    assert command[7:] == (["--against", against, *data] if against else [])


def test_an_examination_that_cannot_be_done_is_no_refusal() -> None:
    def fail(command: Sequence[str]) -> None:
        raise StageError("MLflow is down")

    with pytest.raises(StageError, match="version 7 was not examined: MLflow is down"):
        examine(VERSION, "", fail)
