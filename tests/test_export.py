"""Exports of a small registered model that really answers: as it was, told as it is, or not at all."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image

from stages import examine, export, register
from stages.evaluation import exporting
from stages.registry import versions
from stages.registry.client import open_client
from stages.registry.exporting import facts_of
from stages.registry.tags import MODEL_SHA256
from stages.runtime.command import StageError
from stages.runtime.files import sha256
from stages.training.networks.models import Classifier, build, load_classifier
from tests.bells import CLASSES, asked_here, set_name, tree_of_bells, write_model
from tests.conftest import Once


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, once: Once, new_database: Callable[[Path], None]) -> Iterator[Path]:
    """Two versions, of which the second was exported in both formats."""
    with (
        tree_of_bells(tmp_path_factory.mktemp("tree"), once, new_database) as folder,
        asked_here(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(exporting, "TIMED", 3)
        register.main()
        write_model(folder, noise=0.01)
        register.main()
        for form in export.FORMATS:
            patch.setattr("sys.argv", ["export", "--format", form])
            export.main()
        yield folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command."""
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    export.main()


def artifact(number: int, name: str) -> Path:
    """A file of the version's run, in the folder of its registration."""
    version = versions.by_address(f"models:/bells/{number}")
    return Path(open_client().get_run(version.run_id).info.artifact_uri, "registered/bells", name)


def recorded(number: int) -> dict[str, Any]:
    """exports.json of a version."""
    return json.loads(artifact(number, "exports.json").read_text(encoding="utf-8"))


def asked_onnx(path: Path, pixels: np.ndarray) -> np.ndarray:
    """What ONNX Runtime says, with nothing of this project."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": pixels})[0])


def prepared(data: bytes, facts: dict[str, Any]) -> np.ndarray:
    """An image as the JSON beside the file says, by Pillow alone: (1, 3, S, S) uint8."""
    resize, side = facts["resize"], facts["image_size"]
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    width, height = (max(resize, round(each * resize / min(image.size))) for each in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    return np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)[None].copy()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("form", export.FORMATS)
def test_the_newest_version_is_exported_beside_what_a_user_must_know(tree: Path, form: str) -> None:
    path = tree / f"models/exports/bells/2/model.{form}"
    facts = json.loads(path.with_name(f"model.{form}.json").read_text(encoding="utf-8"))
    assert (facts["model"], facts["version"], facts["classes"]) == ("bells", 2, CLASSES)
    assert (facts["resize"], facts["image_size"], facts["format"]) == (72, 64, form)
    assert facts["weights_sha256"] == sha256(tree / "models/finetuned/model.safetensors")
    assert facts["sha256"] == sha256(path)
    assert {each.name for each in path.parent.iterdir()} == {
        f"model.{each}{end}" for each in export.FORMATS for end in ("", ".json")
    }


def test_a_user_who_follows_the_json_gets_the_answers_that_are_served(tree: Path) -> None:
    """From the file of an image on, without this project's code; the canary holds what the served model said."""
    facts = json.loads((tree / "models/exports/bells/2/model.onnx.json").read_text(encoding="utf-8"))
    canary = pd.read_parquet(artifact(2, "canary.parquet"))
    pixels = np.concatenate([prepared(data, facts) for data in canary["image"]])
    said = softmax(asked_onnx(tree / "models/exports/bells/2/model.onnx", pixels))
    np.testing.assert_allclose(said, np.stack(canary["probabilities"].to_list()), atol=1e-4)
    assert len(set(said.argmax(1))) > 1  # they are not all one class, or the test would show little


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_images_is_answered_alike_in_both_formats(tree: Path, count: int) -> None:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3, 64, 64), dtype=np.uint8)
    loaded = torch.export.load(tree / "models/exports/bells/2/model.pt2").module()
    by_torch = loaded(torch.from_numpy(pixels)).detach().numpy()
    by_onnx = asked_onnx(tree / "models/exports/bells/2/model.onnx", pixels)
    assert by_torch.shape == by_onnx.shape == (count, 3)
    np.testing.assert_allclose(by_onnx, by_torch, rtol=1e-4, atol=1e-3)


def test_the_facts_are_within_the_file_and_nothing_of_this_machine(tree: Path) -> None:
    folder = tree / "models/exports/bells/2"
    within = {exporting.FACTS: ""}
    torch.export.load(folder / "model.pt2", extra_files=within)
    (entry,) = onnx.load(folder / "model.onnx").metadata_props
    for text in (within[exporting.FACTS], entry.value):
        assert json.loads(text)["classes"] == CLASSES
    for form in export.FORMATS:
        data = (folder / f"model.{form}").read_bytes()
        assert b"stages/training" not in data and b"site-packages" not in data


@pytest.mark.usefixtures("tree")
def test_files_and_figures_are_recorded_with_the_version() -> None:
    exports = recorded(2)
    version = versions.by_address("models:/bells/2")
    assert set(exports) == set(export.FORMATS)
    for form, row in exports.items():
        stored = artifact(2, row["file"])
        assert row["images"] == 48 and row["changed"] == 0
        assert row["max_probability_difference"] < exporting.MAX_DIFFERENCE / 10
        assert row["max_logit_difference"] < 1e-3
        assert row["bytes"] == stored.stat().st_size
        assert row["original_bytes"] == Path("models/finetuned/model.safetensors").stat().st_size
        assert row["sha256"] == sha256(stored) == version.tags[f"export.{form}"]
        assert json.loads(artifact(2, f"{row['file']}.json").read_text())["sha256"] == row["sha256"]
        for who in ("exported", "original"):
            for median, p95 in row["cpu"][who].values():
                assert 0 < median <= p95
    assert exports["pt2"]["max_logit_difference"] == 0  # the same kernels


@pytest.mark.usefixtures("tree")
def test_the_page_gains_a_section_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = artifact(1, "review.html").read_text()
    assert "Exports" not in before
    for _ in range(2):  # the second time its row is replaced
        run(monkeypatch, "--format", "pt2", "--version", "1")
        page = artifact(1, "review.html").read_text()
        start, end = page.index("<!-- exports -->"), page.index("<!-- end of exports -->\n") + 24
        assert page[:start] + page[end:].lstrip("\n") == before
        assert page.count("<h2>Exports</h2>") == 1 and page.count("exports/model.pt2") == 1
    assert set(recorded(1)) == {"pt2"}
    of_both = artifact(2, "review.html").read_text()
    assert of_both.count("exports/model.onnx") == of_both.count("exports/model.pt2") == 1
    assert of_both.count("<h2>Exports</h2>") == 1


@pytest.mark.usefixtures("tree")
def test_a_gate_taken_again_keeps_the_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["examine", "bells", "2", "--against", "1"])
    examine.main()
    page = artifact(2, "review.html").read_text()
    assert "against version 1" in page
    assert "exports/model.onnx" in page and "exports/model.pt2" in page


@pytest.mark.parametrize("form", export.FORMATS)
def test_the_same_version_gives_the_same_bytes(tree: Path, tmp_path: Path, form: str) -> None:
    model, config = load_classifier(tree / "models/finetuned")
    facts = facts_of(versions.by_address("models:/bells@challenger"), config, form)
    exporting.write(model, facts, form, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tree / f"models/exports/bells/2/model.{form}").read_bytes()


@pytest.mark.usefixtures("tree")
def test_a_file_that_answers_otherwise_is_refused_and_what_was_there_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As an exporter would be wrong: the head of what it writes differs a little."""
    write = exporting.write

    def wrong(model: Classifier, *rest: Any) -> None:
        weight = model.head.weight.detach().clone()
        with torch.no_grad():
            model.head.weight.mul_(1.05)
            write(model, *rest)
            model.head.weight.copy_(weight)

    before, kept = recorded(2), versions.by_address("models:/bells/2")
    (tmp_path / "model.pt2").write_text("before")
    (tmp_path / "model.pt2.json").write_text("{}")
    monkeypatch.setattr(exporting, "write", wrong)
    with pytest.raises(
        StageError, match="the pt2 file does not answer as the registered model does: on 48 test images"
    ):
        run(monkeypatch, "--format", "pt2", "--out", str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.pt2": "before",
        "model.pt2.json": "{}",
    }
    assert (recorded(2), versions.by_address("models:/bells/2")) == (before, kept)


def test_what_is_no_number_is_never_taken_for_near() -> None:
    nothing = np.full((2, 3), np.nan, np.float32)
    found = exporting.compare(lambda _: np.eye(2, 3, dtype=np.float32), lambda _: nothing, [np.zeros(2, np.uint8)])
    assert found.probability == float("inf")
    with pytest.raises(StageError, match="does not answer"):
        exporting.check(found, "onnx")


def test_an_architecture_that_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class Branching(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :3] if images.sum() > 0 else images.flatten(1)[:, 3:6]

    facts = {"architecture": "branching", "image_size": 16}
    with pytest.raises(StageError, match="branching cannot be exported as pt2 by torch"):
        exporting.write(Branching(), facts, "pt2", tmp_path / "model.pt2")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_weights_that_onnx_has_no_room_for_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting, "MOST_OF_ONNX", 1000)
    config = {"architecture": "shufflenet_v2_x0_5", "classes": CLASSES, "image_size": 64}
    model = build(config | {"mean": [0.5] * 3, "std": [0.2] * 3}, seed=0)
    with pytest.raises(StageError, match="use --format pt2"):
        exporting.write(model, config, "onnx", tmp_path / "model.onnx")


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--version", "9"), "bells has no version 9; it has 2 @challenger, 1"),
        (("--alias", "serving"), "bells has no version with the alias serving"),
        (("--out", "params.yaml"), "params.yaml is no folder"),
    ],
)
def test_what_is_not_there_cannot_be_exported(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        run(monkeypatch, "--format", "onnx", *arguments)


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("arguments", [("--format", "tflite"), (), ("--format", "onnx", "--version", "first")])
def test_a_command_that_is_none_ends_with_its_usage(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_without_a_registered_version_or_a_registry_that_is_said(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_name(tree, "nobody")
    with pytest.raises(StageError, match="no version of a model called nobody"):
        run(monkeypatch, "--format", "onnx")
    set_name(tree, "bells")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(StageError, match="there is no registry"):
        run(monkeypatch, "--format", "onnx")


def test_without_test_images_nothing_is_exported(tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shards = tree / "data/shards/finetune"
    shards.rename(tree / "aside")
    try:
        with pytest.raises(StageError, match="data/shards/finetune holds no test image"):
            run(monkeypatch, "--format", "onnx", "--out", str(tmp_path / "out"))
    finally:
        (tree / "aside").rename(shards)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tree")
def test_weights_that_are_not_those_registered_are_not_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = versions.by_address("models:/bells/1")
    versions.set_tags(version, {MODEL_SHA256: "0" * 64})
    try:
        with pytest.raises(StageError, match="but its tag says 0000"):
            run(monkeypatch, "--format", "onnx", "--version", "1", "--out", str(tmp_path))
    finally:
        versions.set_tags(version, {MODEL_SHA256: version.sha256})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tree")
def test_a_record_that_cannot_be_read_is_made_anew_and_a_page_that_is_gone_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact(1, "exports.json").write_text('{"onnx": ')
    artifact(1, "review.html").unlink()
    run(monkeypatch, "--format", "pt2", "--version", "1")
    assert "the exports recorded with version 1 cannot be read" in caplog.text
    assert "version 1 has no review.html" in caplog.text
    assert set(recorded(1)) == {"pt2"}
    assert not artifact(1, "review.html").exists()


@pytest.mark.gpu
@pytest.mark.usefixtures("tree")
def test_on_a_gpu_both_are_measured() -> None:
    row = recorded(2)["pt2"]["gpu"]
    assert row["exported"]["single_ms"][0] > 0 and row["original"]["batch_ms"][0] > 0
