"""The stage evaluate on real shards and real (untrained) models: every accepted image once, the same bytes again."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from stages import evaluate
from stages.data.raw.facts import ACCEPTED, QUARANTINE
from stages.data.shards.loading.samples.index import read_samples
from stages.data.shards.writing import write_shard_set
from stages.evaluation.predictions import check_complete
from stages.params.shard import Shard
from stages.runtime.command import StageError
from stages.runtime.tables import write_table

CLASSES = ["blue", "green", "red"]
FEW = "robustness: {images: 7, corruptions: [fog, jpeg_compression], severities: 2, epsilons: [4], pgd_steps: 2}"


def params(evaluate: str) -> str:
    """A small params.yaml."""
    return f"evaluate: {{bootstrap: 200, {evaluate}}}\ntraining: {{device: cpu, threads: 1}}\n"


COUNTS = {"first": {"train": 12, "val": 3, "test": 31}, "later": {"train": 6, "val": 3, "fresh": 14}}


def _jpeg(rng: np.random.Generator, label: int) -> bytes:
    pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    pixels[..., 2 - label] = 230
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _rows(batch: str, raw: Path, rng: np.random.Generator) -> pd.DataFrame:
    """Writes one raw tar and returns its accepted rows."""
    rows = []
    (raw / "all").mkdir(parents=True)
    with tarfile.open(raw / "all/c.tar", "w") as tar:
        for split, n in COUNTS[batch].items():
            for i in range(n):
                label, name = i % 3, f"{split}-{i}.JPEG"
                info, data = tarfile.TarInfo(name), _jpeg(rng, label)
                info.size = len(data)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
                key = f"{batch}/all/{CLASSES[label]}/{name}"
                rows.append(
                    {
                        "key": key, "batch": batch, "tar": "all/c.tar", "offset": offset,
                        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "split": split, "label": label,
                        "width": 40, "height": 36, "format": "JPEG", "mode": "RGB", "brightness": 50.0 + i,
                        "contrast": 20.0 + i % 5,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=ACCEPTED.names)


def _save_models(folder: Path) -> None:
    from stages.training.networks.models import build, save_classifier

    config: dict[str, Any] = {
        "architecture": "resnet18", "classes": CLASSES, "image_size": 32, "resize": 36,
        "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip
    for seed, name in enumerate(("backbone", "finetuned", "scratch")):
        save_classifier(build(config, seed), config, folder / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository root with everything that evaluate depends on."""
    root = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(1)
    for batch in COUNTS:
        raw, shards = root / "raw" / batch, root / "data/shards/finetune" / batch
        shards.mkdir(parents=True)
        accepted = _rows(batch, raw, rng)
        write_table(accepted, ACCEPTED, root / f"data/accepted/finetune/{batch}.parquet")
        write_shard_set(accepted, raw, shards, Shard(resize=36, quality=90, images_per_shard=10), "finetune", batch)
    bad = pd.DataFrame({"key": ["first/x"], "batch": ["first"], "reason": ["decodes"]}).reindex(
        columns=QUARANTINE.names
    )
    write_table(bad, QUARANTINE, root / "data/quarantine.parquet")
    (root / "data/classes").mkdir()
    (root / "data/classes/finetune.json").write_text(json.dumps(CLASSES))
    _save_models(root / "models")
    (root / "reports/finetune").mkdir(parents=True)
    epochs = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.1, "val_top1": 0.4}]
    (root / "reports/finetune/metrics.json").write_text(json.dumps({"finetuned": {"epochs": epochs}}))
    (root / "params.yaml").write_text(params("batch_size: 8, " + FEW))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy, in which the stage runs."""
    shutil.copytree(made, tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root")
    monkeypatch.setattr("sys.argv", ["evaluate"])
    # The stage makes torch deterministic for its process, which here is that of all tests.
    import torch

    threads = torch.get_num_threads()
    yield tmp_path / "root"
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def _outputs(root: Path) -> dict[str, str]:
    files = [path for path in sorted((root / "reports").rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_accepted_image_of_test_and_fresh_is_scored_once_and_the_bytes_are_the_same_again(root: Path) -> None:
    evaluate.main()
    predictions = pd.read_parquet("reports/predictions.parquet")
    accepted = pd.concat(pd.read_parquet(path) for path in Path("data/accepted/finetune").glob("*.parquet"))
    expected = accepted[accepted["split"].isin(["test", "fresh"])].set_index("key")
    assert sorted(predictions["key"]) == sorted(expected.index)
    joined = predictions.set_index("key").join(expected.add_suffix("_accepted"))
    for column in ("batch", "split", "label"):
        assert (joined[column] == joined[f"{column}_accepted"]).all()
    first = _outputs(root)
    evaluate.main()
    assert _outputs(root) == first
    # What the batches are cut to changes nothing but the last bits of sums in convolutions.
    Path("params.yaml").write_text(params("batch_size: 5, " + FEW))
    evaluate.main()
    again = pd.read_parquet("reports/predictions.parquet")
    assert again["key"].tolist() == predictions["key"].tolist()
    assert np.allclose(np.stack(again["logits"].to_list()), np.stack(predictions["logits"].to_list()), atol=0.1)


def test_metrics_are_those_of_the_predictions(root: Path) -> None:
    evaluate.main()
    found = json.loads(Path("reports/metrics.json").read_text())
    rows = pd.read_parquet("reports/predictions.parquet")
    for split, part in (("test", found["test"]), ("fresh", found["fresh"]["later"])):
        of_split = rows[rows["split"] == split]
        predicted = np.stack(of_split["logits"].to_list()).argmax(axis=1)
        assert part["count"] == len(of_split)
        assert part["top1"] == pytest.approx(accuracy_score(of_split["label"], predicted), abs=1e-6)
        expected = f1_score(of_split["label"], predicted, average="macro")
        assert part["macro_f1"] == pytest.approx(expected, abs=1e-6)
        assert part["top1_low"] <= part["top1"] <= part["top1_high"]
    suspects = pd.read_csv("reports/label_suspects.csv")
    assert found["data"] == {"accepted": 69, "quarantined": 1, "label_suspects": len(suspects)}
    assert (suspects["label"] != suspects["suggested"]).all()
    assert found["robustness"]["images"] == 7
    assert set(found["robustness"]["corruptions"]) == {"fog", "jpeg_compression"}
    assert found["slices"]["looked_at"] >= len(pd.read_csv("reports/plots/slices.csv")) > 0
    assert (found["before"]["nll"], found["before"]["ece"]) == (None, None)
    assert found["scratch"]["ece"] is not None
    for name in ("before", "scratch"):
        assert found["gain"][name]["top1"] == pytest.approx(found["test"]["top1"] - found[name]["top1"], abs=2e-6)
    # Colours are told apart by any network, even a random one: the head of class means works.
    assert found["before"]["top1"] > 0.9


def test_plots_are_tables_that_dvc_draws(root: Path) -> None:
    evaluate.main()
    plots = {path.stem: pd.read_csv(path) for path in Path("reports/plots").glob("*.csv")}
    assert set(plots) == {
        "confusion",
        "reliability",
        "per_class",
        "curves",
        "slices",
        "robustness",
        "selective",
    }
    assert list(plots["confusion"].columns) == ["actual", "predicted"]
    assert len(plots["confusion"]) == 31
    assert plots["reliability"]["count"].sum() == 31
    assert sorted(plots["per_class"]["class"]) == CLASSES
    assert plots["curves"][["run", "epoch", "val_top1"]].values.tolist() == [["finetuned", 1, 0.4]]


def test_the_report_is_one_file_without_scripts_and_network(root: Path) -> None:
    evaluate.main()
    page = Path("reports/report.html").read_text()
    for forbidden in ("<script", "http://", "https://", 'src="/', "@import", "url("):
        assert forbidden not in page
    test = json.loads(Path("reports/metrics.json").read_text())["test"]
    assert f"{100 * test['top1']:.1f}\u00a0%" in page
    wrong = 31 - round(31 * test["top1"])
    mistakes = page[page.index("<h2>Most confident mistakes") : page.index("<h2>Least confident hits")]
    assert mistakes.count('class="pair"') == min(wrong, 24) > 0
    assert mistakes.count("data:image/jpeg;base64,") == min(wrong, 24) * (2 + 3)  # crop, heat map, three neighbours


def test_no_galleries_but_their_neighbours_where_none_are_wanted(root: Path) -> None:
    Path("params.yaml").write_text(params("gallery: 0, robustness: null"))
    evaluate.main()
    assert 'class="pair"' not in Path("reports/report.html").read_text()
    Path("params.yaml").write_text(params("gallery: 0, robustness: {images: 5, corruptions: [], epsilons: []}"))
    evaluate.main()
    robustness = json.loads(Path("reports/metrics.json").read_text())["robustness"]
    assert set(robustness) == {"images", "clean", "corruptions", "attacks", "consistency"}


def test_without_a_model_from_scratch_its_figures_are_null(root: Path) -> None:
    for path in Path("models/scratch").iterdir():
        path.unlink()
    evaluate.main()
    found = json.loads(Path("reports/metrics.json").read_text())
    assert set(found["scratch"].values()) == {None}
    assert "scratch" not in found["gain"]
    assert "From scratch</" not in Path("reports/report.html").read_text()


def _change(column: str, key: str, value: str | int) -> None:
    path = Path("data/accepted/finetune/first.parquet")
    rows = pd.read_parquet(path)
    rows.loc[rows["key"] == key, column] = value
    write_table(rows, ACCEPTED, path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("key", "first/all/blue/other.JPEG", "1 accepted images of test are not in the shards, .*other.JPEG"),
        ("split", "train", "1 images of test were not accepted, .*test-0.JPEG"),
        ("label", 2, "1 images of test have another label, .*test-0.JPEG"),
    ],
)
def test_shards_that_are_not_the_accepted_images_stop(root: Path, column: str, value: str | int, message: str) -> None:
    _change(column, "first/all/blue/test-0.JPEG", value)
    with pytest.raises(StageError, match=message):
        evaluate.main()
    assert not Path("reports/metrics.json").exists()


def test_an_image_twice_in_the_shards_stops(root: Path) -> None:
    sets = [Path("data/shards/finetune/first")] * 2
    twice = {"test": read_samples(sets, "test")}
    with pytest.raises(StageError, match="twice in test"):
        check_complete(twice, Path("data/accepted/finetune"))


def test_no_test_images_and_other_classes_stop(root: Path) -> None:
    Path("data/classes/finetune.json").write_text(json.dumps([*CLASSES, "yellow"]))
    with pytest.raises(StageError, match="name other classes"):
        evaluate.main()
    shutil.rmtree("data/shards/finetune/first")
    with pytest.raises(StageError, match="no labelled test image"):
        evaluate.main()
