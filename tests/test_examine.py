"""Examining registered versions: their weights, their answers, and whether their verdict is about what is in force."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages import examine, register
from stages.registry import examining, model_process, versions
from stages.registry.client import open_client
from stages.registry.tags import MODEL_SHA256
from stages.registry.versions import Version
from stages.runtime.command import StageError
from tests.bells import PARAMS, asked_here, set_name, tree_of_bells, write_model, write_shards
from tests.conftest import Once


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, once: Once, new_database: Callable[[Path], None]) -> Iterator[Path]:
    """Two versions, both registered while nothing was in force: each verdict is one of floors."""
    with tree_of_bells(tmp_path_factory.mktemp("tree"), once, new_database) as folder, asked_here():
        register.main()
        write_model(folder, noise=0.01)
        register.main()
        yield folder


def version(number: int) -> Version:
    """As it is now."""
    return versions.by_address(f"models:/bells/{number}")


def artifact(number: int, name: str) -> Path:
    """A file of the version's run."""
    root = Path(open_client().get_run(version(number).run_id).info.artifact_uri)
    return root / name


def look(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, object]:
    """The command, and the file that it writes."""
    monkeypatch.setattr("sys.argv", ["examine", "bells", *arguments, "--json", "found.json"])
    examine.main()
    return json.loads(Path("found.json").read_text())


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """Whatever is done to a file or folder is undone."""
    aside = path.with_name(f"kept-{path.name}")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, aside)
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        aside.rename(path)


@pytest.mark.usefixtures("tree")
def test_what_was_registered_is_sound_and_its_verdict_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the fresh process itself, once."""
    with pytest.MonkeyPatch.context() as real:
        real.setattr(model_process, "_request", REAL_REQUEST)
        real.setattr(model_process, "fresh_process", REAL_PROCESS)
        found = look(monkeypatch, "1", "--against", "none")
    assert found == {"sound": True, "gate": "passed", "retaken": False, "reasons": []}
    assert "bells version 1 is sound\ngate: passed" in capsys.readouterr().out


def test_a_verdict_against_other_weights_is_taken_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = version(2)
    assert (before.tags["gate"], before.tags["gate.in_force"], before.tags["gate.decision"]) == ("passed", "none", "2")
    found = look(monkeypatch, "2", "--against", "1")
    assert (found["sound"], found["gate"], found["retaken"]) == (True, "inconclusive", True)
    assert "better on test or on fresh: inconclusive" in str(found["reasons"])
    after = version(2)
    assert after.tags == before.tags | {
        "gate": "inconclusive",
        "gate.in_force": version(1).sha256,
        "gate.decision": "3",
    }
    assert "version 1" in after.description and "version 1" not in before.description
    assert "Reproduce" in after.description
    gate = json.loads(artifact(2, "registered/bells/gate.json").read_text())
    assert (gate["in_force"], gate["result"]) == (version(1).sha256, "inconclusive")
    assert "version 1" in artifact(2, "registered/bells/review.html").read_text()
    # Now it is about what is in force: it stands, with the same reasons.
    assert look(monkeypatch, "2", "--against", "1") == found | {"retaken": False}
    assert version(2) == after
    # Without --against it is nobody's business.
    assert look(monkeypatch, "2") == found | {"retaken": False}
    # The parameters are those of now.
    set_name(tree, "bells", gate=PARAMS["gate"] | {"min_top1": 1})
    assert look(monkeypatch, "2", "--against", "none")["gate"] == "failed"
    set_name(tree, "bells")


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("written", [1, 4])  # of 7: the fourth is the tag `gate`
def test_a_verdict_that_was_half_written_is_taken_again(monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Killed behind any of its writes: the new result never stands beside whom the old one was taken against."""
    look(monkeypatch, "2", "--against", "none")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        client = type(open_client())
        writes = iter(range(1, written + 1))
        for name in ("delete_model_version_tag", "log_artifacts", "update_model_version", "set_model_version_tag"):
            patch.setattr(client, name, _dying_behind(getattr(client, name), writes, written))
        look(monkeypatch, "2", "--against", "1")
        pytest.fail("it has fewer writes")
    assert version(2).tags.get("gate.in_force") in (None, version(1).sha256)
    found = look(monkeypatch, "2", "--against", "none")
    assert (found["gate"], found["retaken"], version(2).tags["gate.in_force"]) == ("passed", True, "none")


def _dying_behind(write: Callable[..., Any], writes: Iterator[int], last: int) -> Callable[..., Any]:
    def done(*arguments: Any, **named: Any) -> Any:
        result = write(*arguments, **named)
        if next(writes) == last:
            raise KeyboardInterrupt
        return result

    return done


def flip_a_byte(number: int) -> None:
    path = next(model_folder(number).rglob("model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def model_folder(number: int) -> Path:
    """Where the registry keeps the model."""
    source = version(number).source.removeprefix("models:/")
    return Path(open_client().get_logged_model(source).artifact_location)


def answer_otherwise(number: int) -> None:
    path = artifact(number, "registered/bells/canary.parquet")
    canary = pd.read_parquet(path)
    canary["probabilities"] = [np.roll(each, 1) for each in canary["probabilities"]]
    canary.to_parquet(path)


def lose_a_class(number: int) -> None:
    path = artifact(number, "registered/bells/canary.parquet")
    canary = pd.read_parquet(path)
    canary["probabilities"] = [each[:2] for each in canary["probabilities"]]
    canary.to_parquet(path)


def lose_the_canary(number: int) -> None:
    artifact(number, "registered/bells/canary.parquet").unlink()


def damage_the_canary(number: int) -> None:
    artifact(number, "registered/bells/canary.parquet").write_bytes(b"PAR1 and no more")


def lose_the_code(number: int) -> None:
    (model_folder(number) / "served_model.py").unlink()


def lose_the_weights(number: int) -> None:
    next(model_folder(number).rglob("model.safetensors")).unlink()


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, "its weights are not those registered"),
        (answer_otherwise, "it does not answer as it did when it was registered: on 16 recorded images"),
        (lose_a_class, "it answers with 3 classes, once it was 2"),
        (lose_the_canary, "no images and answers are recorded with it"),
        (damage_the_canary, "no images and answers are recorded with it"),
        (lose_the_code, "does not load and answer"),
        (lose_the_weights, "does not load and answer"),
    ],
)
def test_a_version_that_is_not_what_was_registered_is_not_sound(
    monkeypatch: pytest.MonkeyPatch, damage: Callable[[int], None], reason: str
) -> None:
    before = version(1)
    with kept(model_folder(1)), kept(artifact(1, "registered")):
        damage(1)
        found = look(monkeypatch, "1", "--against", "2")
    assert not found["sound"]
    assert reason in str(found["reasons"])
    assert (found["gate"], found["retaken"]) == ("passed", False)  # what is not put in force needs no verdict
    assert version(1) == before


def test_a_version_without_recorded_images_is_sound_when_it_is_registered_anew(tree: Path) -> None:
    """As the refusal advises; while it is there, its weights end as `unchanged`."""
    set_name(tree, "anew")
    register.main()
    (before,) = versions.list_versions("anew")
    Path(open_client().get_run(before.run_id).info.artifact_uri, "registered/anew/canary.parquet").unlink()
    (reason,), _ = examining.soundness(before)
    assert "delete this version" in reason and "`dvc repro -f -s register`" in reason
    register.main()
    assert examining.soundness(before)[0] == [reason]
    versions.delete_version(before)
    register.main()
    (after,) = versions.list_versions("anew")
    assert (after.number, after.sha256) == (2, before.sha256)
    assert examining.soundness(after)[0] == []
    set_name(tree, "bells")


@pytest.mark.usefixtures("tree")
def test_versions_that_cannot_be_compared_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version in force answered other test images, or nothing that is left; or the candidate's own are gone."""
    reports = "reports/predictions.parquet"
    with kept(artifact(2, "reports")), kept(Path("data/shards/finetune")):
        shutil.rmtree("data/shards/finetune/target")  # nor can it be asked now
        table = pd.read_parquet(artifact(2, reports))
        table.assign(key=[f"{key}.other" for key in table["key"]]).to_parquet(artifact(2, reports))
        found = look(monkeypatch, "1", "--against", "2")
        assert (found["gate"], found["retaken"]) == ("inconclusive", True)
        assert "test set" in str(found["reasons"])
        look(monkeypatch, "1", "--against", "none")
        artifact(2, reports).unlink()
        found = look(monkeypatch, "1", "--against", "2")
        assert (found["gate"], found["retaken"]) == ("inconclusive", True)
    assert look(monkeypatch, "1", "--against", "none")["gate"] == "passed"
    before = version(1)
    with kept(artifact(1, "reports")):
        artifact(1, reports).unlink()
        found = look(monkeypatch, "1", "--against", "2")
    assert found["sound"]
    assert (found["gate"], found["retaken"]) == ("inconclusive", False)
    assert "cannot be taken again: its run" in str(found["reasons"])
    assert version(1) == before
    assert before.tags["gate.in_force"] == "none"


@pytest.mark.usefixtures("tree")
def test_a_verdict_that_cannot_be_read_is_no_fault_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(artifact(1, "registered/bells/gate.json")) as path:
        path.write_text('{"result": "pas')
        assert look(monkeypatch, "1") == {"sound": True, "gate": "passed", "retaken": False, "reasons": []}


@pytest.mark.usefixtures("tree")
def test_against_a_version_whose_weights_are_not_known_no_verdict_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody took its tag away: an empty one would have meant that the gate does not matter."""
    weights = version(1).sha256
    versions.delete_tag(version(1), MODEL_SHA256)
    try:
        with pytest.raises(StageError, match=r"version 1 has no tag model\.sha256"):
            look(monkeypatch, "2", "--against", "1")
    finally:
        versions.set_tags(version(1), {MODEL_SHA256: weights})


@pytest.mark.usefixtures("tree")
def test_a_registry_that_is_down_is_no_fault_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(model_folder(1)):
        lose_the_weights(1)
        with pytest.MonkeyPatch.context() as patch:
            looked = iter([[version(1)]])  # the registry answers once, and not again
            patch.setattr(versions, "list_versions", lambda name: next(looked, None) or broken())
            with pytest.raises(StageError, match=r"MLflow at .* failed: gone"):
                look(monkeypatch, "1")


def broken() -> list[Version]:
    """What MLflow does when its server has gone."""
    from mlflow.exceptions import MlflowException

    raise MlflowException("gone")


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("9",), "bells has no version 9; it has 2 @challenger, 1"),
        (("1", "--against", "9"), "bells has no version 9"),
        (("1", "--against", "1"), "cannot be held against itself"),
        (("first",), "no registered model"),
    ],
)
def test_what_is_not_there_cannot_be_examined(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    Path("found.json").unlink(missing_ok=True)
    with pytest.raises(StageError, match=message):
        look(monkeypatch, *arguments)
    assert not Path("found.json").exists()


def test_the_version_in_force_is_asked_about_a_later_delivery_when_the_gate_is_taken_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards are where the candidate was trained; here others have their name. The last test: it adds a version."""
    here, there = Path("data/shards/finetune"), Path("elsewhere/data/shards/finetune")
    write_shards(tree, "later", "fresh", 12)
    write_model(tree, noise=0.02)
    register.main()
    there.mkdir(parents=True)
    (here / "later").rename(there / "later")
    shutil.copytree(there / "later", here / "later")
    index = json.loads((here / "later/index.json").read_text())
    (here / "later/index.json").write_text(json.dumps(index | {"resize": 7}))
    try:
        look(monkeypatch, "3", "--against", "1")
        assert fresh_images(3) == 0
        found = look(monkeypatch, "3", "--against", "2", "--data", "elsewhere")
        assert found["retaken"]
        assert fresh_images(3) == 12
    finally:
        shutil.rmtree(here / "later")
        write_model(tree, noise=0.01)


def fresh_images(number: int) -> int:
    """How many both versions answered when the gate was taken last."""
    gate = json.loads(artifact(number, "registered/bells/gate.json").read_text())
    return next(each["images"] for each in gate["comparisons"] if each["kind"] == "fresh")


REAL_REQUEST, REAL_PROCESS = model_process._request, model_process.fresh_process
