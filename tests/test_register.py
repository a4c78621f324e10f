"""Registration of a small model that really answers, in a temporary SQLite database, once with the fresh process."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from stages import register, tracking
from stages.command import StageError
from stages.data.facts import QUARANTINE, write_table
from stages.data.loading import read_samples
from stages.data.sharding import write_shard_set
from stages.files import sha256, write_json
from stages.model_card import Batch, render_card
from stages.params.gate import Gate
from stages.params.shard import Shard
from stages.serving import read_pixels
from stages.training.models import Classifier, build, save_classifier

ROOT = Path(__file__).parents[1]
CLASSES = ["bell", "cup|mug", "tent"]
IMAGES = 48
PARAMS = {
    "batches": {"target": {"role": "finetune", "source": "sample:target"}},
    "model": {"architecture": "shufflenet_v2_x0_5", "image_size": 64},
    "finetune": {"strategy": "head"},
    "evaluate": {},
    "gate": {"min_top1": 0.2, "min_worst_class": 0.0, "max_ece": 1.0},
    "register": {"name": "bells"},
}


def make_tree(folder: Path) -> None:
    """What the stages before register leave behind, for 3 classes and 48 test images."""
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
    _write_shards(folder)
    write_json(folder / "data/classes/finetune.json", CLASSES)
    bad = {field.name: "" if field.type == "string" else 0 for field in QUARANTINE} | {"decodes": False}
    write_table(pd.DataFrame([bad | {"reason": "truncated"}]), QUARANTINE, folder / "data/quarantine.parquet")
    write_model(folder)


def _write_shards(folder: Path) -> None:
    raw, out = folder / "raw", folder / "data/shards/finetune/target"
    raw.mkdir(parents=True)
    out.mkdir(parents=True)
    rows = []
    with tarfile.open(raw / "all.tar", "w") as tar:
        for number in range(IMAGES):
            data = picture(number, 90 + number, 80)
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            offset = tar.offset - -(-len(data) // 512) * 512
            digest = hashlib.sha256(data).hexdigest()
            rows.append((f"target/test/x/{number}.jpg", "all.tar", offset, len(data), digest, number % 3, "test"))
    columns = ["key", "tar", "offset", "bytes", "sha256", "label", "split"]
    write_shard_set(pd.DataFrame(rows, columns=columns), raw, out, Shard(resize=72), "finetune", "target")


def picture(seed: int, width: int, height: int) -> bytes:
    """A JPEG of smooth random colours."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_model(folder: Path, noise: float = 0.0) -> None:
    """A model whose answers depend on the image, with its predictions and metrics.

    Labels are those of the model without noise, every fifth one wrong; `noise` in the head makes a similar model.
    """
    config: dict[str, Any] = {
        "architecture": "shufflenet_v2_x0_5", "classes": CLASSES, "image_size": 64, "resize": 72,
        "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2],
    }  # fmt: skip
    samples = read_samples([folder / "data/shards/finetune/target"], "test")
    images = torch.stack([torch.from_numpy(read_pixels(samples.jpeg(i), 72, 64).copy()) for i in range(len(samples))])
    images = images.permute(0, 3, 1, 2)
    model = _sensitive(build(config, seed=1), images)
    with torch.inference_mode():
        labels = model(images).argmax(1).numpy()
        labels[::5] = (labels[::5] + 1) % len(CLASSES)
        model.head.weight.add_(noise * torch.randn(model.head.weight.shape, generator=torch.manual_seed(2)))
        logits = model(images).numpy()
    save_classifier(model, config, folder / "models/finetuned")
    _write_reports(folder, samples.key, logits, labels)


def _sensitive(model: Classifier, images: torch.Tensor) -> Classifier:
    """Random weights answer the same to everything: batch statistics and a large head make them tell images apart."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.inference_mode():
        model.train()(images)
        model.eval()
        features = model.features(images)
        model.head.weight.mul_(2 / (features @ model.head.weight.T).std())
        model.head.bias.copy_(-(features.mean(0) @ model.head.weight.T))
    return model


def _write_reports(folder: Path, keys: list[str], logits: np.ndarray, labels: np.ndarray) -> None:
    table = {"key": keys, "batch": "target", "split": "test", "label": labels, "logits": list(logits)}
    (folder / "reports").mkdir(exist_ok=True)
    pd.DataFrame(table).to_parquet(folder / "reports/predictions.parquet")
    top1 = float((logits.argmax(1) == labels).mean())
    figures = {"top1": top1, "top1_low": top1 - 0.05, "top1_high": top1 + 0.05, "macro_f1": 0.7, "ece": 0.1}
    figures |= {"count": len(keys), "worst_class_recall": 0.5}
    data = {"accepted": 48, "quarantined": 1}
    parts = {"test": figures, "before": {"top1": 0.4}, "scratch": {"top1": None}, "data": data}
    write_json(folder / "reports/metrics.json", parts)
    write_json(folder / "reports/finetune/metrics.json", {"finetuned": {"epochs": [{"epoch": 0, "train_loss": 1.0}]}})


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tree in which the stage ran once, for real: a fresh process loaded the logged model and answered."""
    folder = tmp_path_factory.mktemp("tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr("sys.argv", ["register"])
        make_tree(folder)
        register.main()
        yield folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process is left out: `tree` has shown it, and it takes longer than all the rest."""
    monkeypatch.setattr(register, "_fresh_process", nullcontext)
    monkeypatch.setattr(register, "_ask", lambda fresh, source: (10.0, 20.0))


def test_a_registered_version_can_be_decided_on_from_its_page(tree: Path) -> None:
    (version,) = tracking.versions("bells")
    assert version.aliases == ("challenger",)
    assert version.tags["gate"] == "passed"
    assert version.sha256 == sha256(tree / "models/finetuned/model.safetensors")
    assert "registering" not in version.tags
    assert "git.commit" not in version.tags  # this folder is no repository
    card = tracking.open_client().get_model_version("bells", "1").description or ""
    for expected in ("Gate: passed", "79.2 %", "40.0 %", "cup\\|mug", "truncated", "48", "/artifacts/report.html"):
        assert expected in card


def test_the_receipt_holds_nothing_that_changes_by_itself(tree: Path) -> None:
    receipt = json.loads((tree / "models/registered.json").read_text())
    assert receipt == {"name": "bells", "sha256": sha256(tree / "models/finetuned/model.safetensors")}


def test_everything_for_a_review_is_with_the_run_and_nothing_else_is_written(tree: Path) -> None:
    run = tracking.find_run(sha256(tree / "models/finetuned/model.safetensors"))
    assert run
    artifacts = Path(run.info.artifact_uri)
    assert artifacts.is_relative_to(tree / "mlartifacts")
    own = ("registered/bells/gate.json", "registered/bells/review.html")
    for name in (*own, "params.yaml", "reports/predictions.parquet", "reports/metrics.json"):
        assert (artifacts / name).is_file()
    assert run.data.metrics["test.top1"] == pytest.approx(38 / 48)
    assert run.data.metrics["latency.p95_ms"] >= run.data.metrics["latency.median_ms"] > 0
    made = {path.name for path in tree.iterdir()}
    assert made == {"params.yaml", "raw", "data", "models", "reports", "mlflow.db", "mlartifacts"}


def test_nothing_of_a_version_needs_pickle(tree: Path) -> None:
    suffixes = {path.suffix for path in (tree / "mlartifacts").rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".joblib"}
    assert ".safetensors" in suffixes


def test_a_model_that_is_registered_ends_as_unchanged(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tracking.open_client().get_model_version("bells", "1")
    (tree / "models/registered.json").unlink()
    register.main()
    assert "unchanged: bells version 1" in capsys.readouterr().out
    assert (tree / "models/registered.json").exists()
    after = tracking.open_client().get_model_version("bells", "1")
    assert after.last_updated_timestamp == before.last_updated_timestamp
    assert len(tracking.versions("bells")) == 1


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("step", ["log_metrics", "create_version", "set_alias", "finish_version"])
def test_a_registration_that_died_is_taken_up_without_a_second_version(
    tree: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    set_name(tree, f"died-in-{step.replace('_', '-')}")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracking, step, die)
        register.main()
    register.main()
    (version,) = tracking.versions(f"died-in-{step.replace('_', '-')}")
    assert version.sha256
    assert version.aliases == ("challenger",)
    assert "registering" not in version.tags


@pytest.mark.usefixtures("asked")
def test_the_next_model_is_held_against_the_one_in_force(tree: Path) -> None:
    set_name(tree, "bells")
    first = tracking.versions("bells")[0]
    tracking.set_alias(first, "champion")
    write_model(tree, noise=0.05)
    register.main()
    second, _ = tracking.versions("bells")
    assert second.aliases == ("challenger",)
    run = tracking.find_run(second.sha256)
    assert run
    own = Path(run.info.artifact_uri, "registered/bells")
    gate = json.loads((own / "gate.json").read_text())
    assert gate["in_force"] == first.sha256
    assert gate["candidate"] == second.sha256
    assert second.tags["gate"] == gate["result"] != "passed"
    page = (own / "review.html").read_text()
    assert "On the same 48 test images" in page
    assert "http" not in page  # self-contained


@pytest.mark.usefixtures("asked")
def test_under_another_name_the_first_version_keeps_its_model_and_its_verdict(tree: Path) -> None:
    set_name(tree, "first-name")
    write_model(tree, noise=0.02)
    register.main()
    (first,) = tracking.versions("first-name")
    run = tracking.find_run(first.sha256)
    assert run
    gate = Path(run.info.artifact_uri, "registered/first-name/gate.json")
    before = gate.read_bytes()
    set_name(tree, "second-name", gate={"min_top1": 1})
    register.main()
    (second,) = tracking.versions("second-name")
    assert (first.sha256, first.run_id) == (second.sha256, second.run_id)
    assert (first.tags["gate"], second.tags["gate"]) == ("passed", "failed")
    assert gate.read_bytes() == before
    for version in (first, second):
        tracking.open_client().get_logged_model(version.source.removeprefix("models:/"))  # raises where it is deleted


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("what", ["no run", "purged", "damaged", "other columns"])
def test_a_version_in_force_without_predictions_blames_nobody_and_blocks_nothing(
    tree: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    name = what.replace(" ", "-")
    set_name(tree, name)
    client = tracking.open_client()
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
    version = tracking.create_version(name, "About", f"models:/{model.model_id}", run_of_version, {}, "Card")
    tracking.finish_version(version, "of-old-weights")
    tracking.set_alias(version, "serving")
    register.main()
    newest = tracking.versions(name)[0]
    assert (newest.number, newest.tags["gate"]) == (2, "inconclusive")
    assert "no predictions of version 1 to compare with" in caplog.text


def test_a_served_model_that_answers_otherwise_is_refused() -> None:
    expected = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    answers = {"class_id": [[0, 1, 2], [1, 0, 2]], "probability": [[0.79, 0.11, 0.1], [0.7, 0.2, 0.1]]}
    register.check_answers(answers, expected)
    mixed_up = answers | {"class_id": [[2, 1, 0], [0, 1, 2]]}
    with pytest.raises(StageError, match="does not answer as the evaluation did"):
        register.check_answers(mixed_up, expected)


def test_with_tracking_off_the_receipt_is_the_same_and_nothing_is_registered(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNSET_TRACKING", "off")
    set_name(tree, "untracked")
    register.main()
    receipt = json.loads((tree / "models/registered.json").read_text())
    assert receipt == {"name": "untracked", "sha256": sha256(tree / "models/finetuned/model.safetensors")}
    assert tracking.versions("untracked") == []


def test_a_card_fits_into_mlflow_whatever_there_is_to_tell(tree: Path) -> None:
    candidate = register._candidate("ab" * 32, 0.95, (1.0, 2.0))
    many = [Batch(f"{'batch' * 10}-{n}", "finetune", {"train": 10_000}) for n in range(300)]
    reasons = {f"{'reason' * 60}-{n}": n for n in range(100)}
    review = register._review("nobody", candidate, Gate())
    card = render_card(replace(candidate, batches=many, quarantined=reasons), review, {"run": "/#/runs/1"})
    assert len(card) <= 5000
    assert "more than fits here" in card
    assert "292 more" in card


def set_name(tree: Path, name: str, **sections: Any) -> None:
    params = PARAMS | {"register": {"name": name}} | sections
    (tree / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
