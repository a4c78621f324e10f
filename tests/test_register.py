"""Registration of a small model that really answers, in a temporary SQLite database, twice with fresh processes."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages import register
from stages.params.gate import Gate
from stages.registry import (
    artifacts,
    gate_review,
    lineage,
    logged_models,
    model_process,
    recording,
    registering,
    versions,
)
from stages.registry.card.model_card import render_card
from stages.registry.client import open_client
from stages.registry.gate_review import BatchCounts
from stages.registry.tags import MODEL_SHA256
from stages.registry.versions import COMMIT_TO_COME, Version
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from tests.bells import CLASSES, PARAMS, asked_here, set_name, tree_of_bells, write_model, write_shards
from tests.conftest import Once


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, once: Once, new_database: Callable[[Path], None]) -> Iterator[Path]:
    """A tree in which the stage ran once, for real: a fresh process loaded the logged model and answered."""
    with tree_of_bells(tmp_path_factory.mktemp("tree"), once, new_database) as folder:
        (folder / "dvc.yaml").write_text("stages: {}\n")
        register.main()
        yield folder


@pytest.fixture
def requested() -> Iterator[None]:
    """`tree` has shown the fresh process."""
    with asked_here():
        yield


def test_a_registered_version_can_be_decided_on_from_its_page(tree: Path) -> None:
    (version,) = versions.list_versions("bells")
    assert version.aliases == ("challenger",)
    assert version.tags["gate"] == "passed"
    assert version.sha256 == sha256(tree / "models/finetuned/model.safetensors")
    assert "registering" not in version.tags
    assert "git.commit" not in version.tags  # this folder is no repository
    assert (version.tags["gate.in_force"], version.tags["gate.decision"]) == ("none", "1")
    assert len(version.tags["test.set"]) == 64
    card = open_client().get_model_version("bells", "1").description or ""
    for expected in ("Gate: passed", "79.2 %", "40.0 %", "cup\\|mug", "truncated", "48", "/artifacts/report.html"):
        assert expected in card


def test_the_receipt_holds_nothing_that_changes_by_itself(tree: Path) -> None:
    receipt = json.loads((tree / "models/registered.json").read_text())
    assert receipt == {"name": "bells", "sha256": sha256(tree / "models/finetuned/model.safetensors")}


def test_everything_for_a_review_is_with_the_run_and_nothing_else_is_written(tree: Path) -> None:
    run = lineage.find_run(sha256(tree / "models/finetuned/model.safetensors"))
    assert run
    root = Path(run.info.artifact_uri)
    assert root.is_relative_to(tree / "mlartifacts")
    own = tuple(f"registered/bells/{name}" for name in ("gate.json", "review.html", "canary.parquet"))
    for name in (*own, "params.yaml", "dvc.yaml", "reports/predictions.parquet", "reports/metrics.json"):
        assert (root / name).is_file()
    assert run.data.metrics["test.top1"] == pytest.approx(38 / 48)
    assert run.data.metrics["latency.p95_ms"] >= run.data.metrics["latency.median_ms"] > 0
    made = {path.name for path in tree.iterdir()}
    assert made == {"params.yaml", "dvc.yaml", "raw", "data", "models", "reports", "mlflow.db", "mlartifacts"}


def test_sixteen_images_are_kept_with_what_the_served_model_said(tree: Path) -> None:
    (version,) = versions.list_versions("bells")
    path = artifacts.download(version.run_id, "registered/bells/canary.parquet", tree / "models")
    assert path
    canary = pd.read_parquet(path)
    path.unlink()
    assert canary["key"].nunique() == len(canary) == 16
    assert all(data.startswith(b"\xff\xd8") for data in canary["image"])
    said = np.stack(canary["probabilities"].to_list())
    logits = pd.read_parquet(tree / "reports/predictions.parquet").set_index("key")["logits"]
    np.testing.assert_array_equal(said.argmax(1), [logits[key].argmax() for key in canary["key"]])
    np.testing.assert_allclose(said.sum(1), 1)


def test_nothing_of_a_version_needs_pickle(tree: Path) -> None:
    suffixes = {path.suffix for path in (tree / "mlartifacts").rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".joblib"}
    assert ".safetensors" in suffixes


def test_a_model_that_is_registered_ends_as_unchanged(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_client().get_model_version("bells", "1")
    (tree / "models/registered.json").unlink()
    register.main()
    assert "unchanged: bells version 1" in capsys.readouterr().out
    assert (tree / "models/registered.json").exists()
    after = open_client().get_model_version("bells", "1")
    assert after.last_updated_timestamp == before.last_updated_timestamp
    assert len(versions.list_versions("bells")) == 1


@pytest.mark.usefixtures("requested")
@pytest.mark.parametrize("step", ["log_metrics", "create_version", "set_alias", "finish_version"])
def test_a_registration_that_died_is_taken_up_without_a_second_version(
    tree: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    set_name(tree, f"died-in-{step.replace('_', '-')}")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logged_models if step == "log_metrics" else versions, step, die)
        register.main()
    register.main()
    (version,) = versions.list_versions(f"died-in-{step.replace('_', '-')}")
    assert version.sha256
    assert version.aliases == ("challenger",)
    assert "registering" not in version.tags


@pytest.mark.usefixtures("requested")
def test_the_next_model_is_held_against_the_one_in_force(tree: Path) -> None:
    set_name(tree, "bells")
    first = versions.list_versions("bells")[0]
    versions.set_alias(first, "champion")
    write_model(tree, noise=0.05)
    register.main()
    second, _ = versions.list_versions("bells")
    assert second.aliases == ("challenger",)
    run = lineage.find_run(second.sha256)
    assert run
    own = Path(run.info.artifact_uri, "registered/bells")
    gate = json.loads((own / "gate.json").read_text())
    assert gate["in_force"] == first.sha256
    assert gate["candidate"] == second.sha256
    assert second.tags["gate"] == gate["result"] != "passed"
    assert (second.tags["gate.in_force"], second.tags["gate.decision"]) == (first.sha256, "2")
    assert second.tags["test.set"] == first.tags["test.set"]
    assert "version 1" in (own / "review.html").read_text()
    assert "/#/compare-runs?" in second.description
    size = (tree / "models/finetuned/model.safetensors").stat().st_size / 1e6
    assert f"| weights, MB&emsp;| {size:.1f}&emsp;| {size:.1f}&emsp;|" in second.description
    assert "| recall of the worst class, %&emsp;| 50.0&emsp;| 50.0&emsp;|" in second.description
    assert f"| one image when registered, ms&emsp;| {first.tags['latency.median_ms']}&emsp;|" in second.description
    assert "own test set" not in second.description


@pytest.mark.usefixtures("requested")
def test_against_a_version_whose_weights_are_not_known_nothing_is_registered(tree: Path) -> None:
    """Somebody took its tag away: the verdict would read as one of floors only."""
    set_name(tree, "tagless")
    write_model(tree, noise=0.07)
    register.main()
    (first,) = versions.list_versions("tagless")
    versions.set_alias(first, "serving")
    versions.delete_tag(first, MODEL_SHA256)
    write_model(tree, noise=0.08)
    with pytest.raises(StageError, match=r"version 1 of tagless, which is in force, has no tag model\.sha256"):
        register.main()
    assert len(versions.list_versions("tagless")) == 1
    run = open_client().get_run(first.run_id)  # what the message advises
    versions.set_tags(first, {MODEL_SHA256: run.data.tags[MODEL_SHA256]})
    register.main()
    assert versions.list_versions("tagless")[0].tags["gate.in_force"] == first.sha256


@pytest.mark.usefixtures("requested")
def test_a_decision_counts_also_when_its_version_is_deleted(tree: Path) -> None:
    set_name(tree, "counts")
    for noise in (0.0, 0.01):
        write_model(tree, noise=noise)
        register.main()
    versions.delete_version(versions.list_versions("counts")[0])  # a challenger that failed
    write_model(tree, noise=0.02)
    register.main()
    newest, first = versions.list_versions("counts")
    assert (first.tags["gate.decision"], newest.tags["gate.decision"]) == ("1", "3")
    assert "Decision number 3 on this test set" in newest.description


@pytest.mark.usefixtures("requested")
def test_under_another_name_the_first_version_keeps_its_model_and_its_verdict(tree: Path) -> None:
    set_name(tree, "first-name")
    write_model(tree, noise=0.02)
    register.main()
    (first,) = versions.list_versions("first-name")
    run = lineage.find_run(first.sha256)
    assert run
    gate = Path(run.info.artifact_uri, "registered/first-name/gate.json")
    before = gate.read_bytes()
    set_name(tree, "second-name", gate={"min_top1": 1})
    register.main()
    (second,) = versions.list_versions("second-name")
    assert (first.sha256, first.run_id) == (second.sha256, second.run_id)
    assert (first.tags["gate"], second.tags["gate"]) == ("passed", "failed")
    assert gate.read_bytes() == before
    for version in (first, second):
        open_client().get_logged_model(version.source.removeprefix("models:/"))  # raises where it is deleted


@pytest.mark.usefixtures("requested")
@pytest.mark.parametrize("what", ["no run", "purged", "damaged", "other columns"])
def test_a_version_in_force_without_predictions_blames_nobody_and_blocks_nothing(
    tree: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    name = what.replace(" ", "-")
    set_name(tree, name)
    client = open_client()
    experiment = client.get_experiment_by_name("synset/finetune")
    assert experiment
    run_id = client.create_run(experiment.experiment_id).info.run_id
    model = client.create_logged_model(experiment.experiment_id, "m", source_run_id=run_id)
    if what in ("damaged", "other columns"):
        (tree / "old").mkdir(exist_ok=True)
        pd.DataFrame({"no": ["logits"]}).to_parquet(tree / "old/predictions.parquet")
        if what == "damaged":
            (tree / "old/predictions.parquet").write_bytes(b"PAR1 and no more")
        client.log_artifact(run_id, str(tree / "old/predictions.parquet"), "reports")
        shutil.rmtree(tree / "old")
    run_of_version = {"no run": "", "purged": "0" * 32}.get(what, run_id)
    version = versions.create_version(name, "About", f"models:/{model.model_id}", run_of_version, {}, "Card")
    versions.finish_version(version, "of-old-weights")
    versions.set_alias(version, "serving")
    register.main()
    newest = versions.list_versions(name)[0]
    assert (newest.number, newest.tags["gate"]) == (2, "inconclusive")
    assert "no predictions of version 1 are recorded" in caplog.text
    assert "version 1 cannot be asked" in caplog.text  # nor is there a model
    assert "| recall of the worst class, %&emsp;| –&emsp;| 50.0&emsp;|" in newest.description
    assert "own test set" not in newest.description


def test_a_served_model_that_answers_otherwise_is_refused() -> None:
    expected = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    registering.check_served(np.array([[0.79, 0.11, 0.1], [0.2, 0.7, 0.1]]), expected)
    with pytest.raises(StageError, match="does not answer as the evaluation did"):
        registering.check_served(expected[:, ::-1], expected)


def test_with_tracking_off_the_receipt_is_the_same_and_nothing_is_registered(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNSET_TRACKING", "off")
    set_name(tree, "untracked")
    register.main()
    receipt = json.loads((tree / "models/registered.json").read_text())
    assert receipt == {"name": "untracked", "sha256": sha256(tree / "models/finetuned/model.safetensors")}
    assert versions.list_versions("untracked") == []


def test_a_card_fits_into_mlflow_whatever_there_is_to_tell(tree: Path) -> None:
    (version, *_) = versions.list_versions("first-name")
    run = lineage.find_run(version.sha256)
    assert run
    set_name(tree, "nobody")
    candidate = registering.read_candidate(version.sha256, 0.95, (1.0, 2.0))
    many = [BatchCounts(f"{'batch' * 10}-{n}", "finetune", {"train": 10_000}) for n in range(300)]
    reasons = {f"{'reason' * 60}-{n}": n for n in range(100)}
    review = registering.take_gate("nobody", candidate, Gate(), run)
    card = render_card(replace(candidate, batches=many, quarantined=reasons), review, {"run": "/#/runs/1"})
    assert len(card) <= 5000


@pytest.mark.usefixtures("requested")
def test_within_retraining_a_version_has_neither_alias_nor_commit_until_it_is_committed(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_name(tree, "unfinished")
    monkeypatch.setattr(lineage, "git_tags", lambda: {"git.commit": "a" * 40, "git.dirty": "true"})
    with monkeypatch.context() as patch:
        patch.setenv("SYNSET_UNFINISHED", "retrain")
        register.main()
    (version,) = versions.list_versions("unfinished")
    assert version.aliases == ()
    assert version.tags["unfinished"] == "retrain"
    assert not {"git.commit", "git.dirty", "registering"} & set(version.tags)
    assert COMMIT_TO_COME in version.description
    register.main()
    assert "unchanged: unfinished version 1" in capsys.readouterr().out
    versions.commit_version(version, "b" * 40)
    (version,) = versions.list_versions("unfinished")
    assert not version.unfinished
    assert "b" * 40 in version.description


@pytest.mark.usefixtures("requested")
def test_the_machine_of_the_training_is_a_tag_of_the_version(tree: Path) -> None:
    set_name(tree, "machine")
    write_model(tree, noise=0.03)
    weights = sha256(tree / "models/finetuned/model.safetensors")
    recording.create_finished("finetune", {}, {MODEL_SHA256: weights, "machine": "cpu zen4 float32"}, [])
    register.main()
    assert versions.list_versions("machine")[0].tags["machine"] == "cpu zen4 float32"


def test_the_version_in_force_is_asked_about_images_that_it_has_not_seen(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By fresh processes: the last test here, as it adds a batch."""
    caplog.set_level("INFO")
    set_name(tree, "grows", gate=PARAMS["gate"] | {"min_n": 5})
    write_model(tree)
    with asked_here():
        register.main()
    (first,) = versions.list_versions("grows")
    versions.set_alias(first, "serving")
    write_shards(tree, "later", "fresh", 12)
    write_model(tree, noise=0.01)
    register.main()
    second, _ = versions.list_versions("grows")
    assert "asking version 1 about 12 images" in caplog.text
    path = artifacts.download(second.run_id, "registered/grows/gate.json", tree / "models")
    assert path
    compared = {(each["kind"], each["name"]): each for each in json.loads(path.read_text())["comparisons"]}
    (fresh,) = (each for (kind, name), each in compared.items() if name == "later")
    # The model without noise is right but for the labels that were made wrong: so it was indeed asked.
    assert (fresh["images"], fresh["before"]) == (12, 9)
    assert next(iter(compared.values()))["images"] == 48


@pytest.mark.usefixtures("requested")
def test_the_version_in_force_is_not_asked_about_images_smaller_than_its_own(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would see them enlarged, and its errors would be those of the candidate's shards. It adds a batch."""
    set_name(tree, "shrinks")
    write_model(tree)
    register.main()
    (first,) = versions.list_versions("shrinks")
    versions.set_alias(first, "serving")
    write_shards(tree, "small", "fresh", 15, resize=66)
    write_model(tree, noise=0.04)
    register.main()
    second, _ = versions.list_versions("shrinks")
    assert "data/shards/finetune/small is left out: its images have 66 px, the model was trained with 72" in caplog.text
    asked = int((pd.read_parquet(tree / "reports/predictions.parquet")["split"] == "fresh").sum())
    left = f"{asked - 15} were" if asked > 15 else "none was"
    assert f"of {asked} fresh images {left} answered by both" in second.description


def test_recorded_answers_count_only_where_a_label_still_means_the_same_class() -> None:
    asked = pd.DataFrame({"key": ["a", "b", "c"], "label": [0, 1, 2]})
    recorded = pd.DataFrame({"key": ["a", "b", "old"], "label": [0, 1, 1], "logits": [[1.0], [2.0], [3.0]]})
    assert gate_review._with_same_labels(recorded, asked)["key"].tolist() == ["a", "b", "old"]
    assert gate_review._with_same_labels(recorded.assign(label=[1, 0, 1]), asked).empty
    assert gate_review._with_same_labels(pd.concat([recorded, recorded]), asked).empty
    assert gate_review._with_same_labels(None, asked).empty


def test_a_version_with_its_classes_in_another_order_is_compared_by_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = Version("bells", 1, "", "models:/m-1", {}, (), "", 0.0)
    predicted = pd.DataFrame({"key": ["a", "b"], "logits": [[1.0, 10.0, 2.0], [3.0, 30.0, 4.0]]})
    monkeypatch.setattr(model_process, "predict_shards", lambda *_: (predicted, ["1", "10", "2"]))
    found = gate_review._predicted_now(version, ["a", "b"], ["1", "2", "10", "20"], [Path("d")])
    assert [logits.tolist() for logits in found["logits"]] == [[1.0, 2.0, 10.0], [3.0, 4.0, 30.0]]


def test_a_version_with_other_classes_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    version = Version("bells", 1, "", "models:/m-1", {}, (), "", 0.0)
    monkeypatch.setattr(
        model_process, "predict_shards", lambda source, keys, shards: (pd.DataFrame({"key": keys}), ["tent", "bell"])
    )
    assert gate_review._predicted_now(version, ["a"], ["tent", "bell", "new"], [Path("d")])["key"].tolist() == ["a"]
    with pytest.raises(StageError, match="it answers in others"):
        gate_review._predicted_now(version, ["a"], CLASSES, [Path("d")])
    with pytest.raises(StageError, match="the shards with these images are not here"):
        gate_review._predicted_now(version, ["a"], CLASSES, [])
