"""The queue of images to label: unsure ones, unlike each other, from a delivery that a small model has not seen."""

import csv
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from stages import label_queue
from stages.data.shards.loading.samples.index import read_samples
from stages.data.shards.writing import write_shard_set
from stages.data.sources.sample import SampleFile, draw
from stages.evaluation.active_learning import CANDIDATES, diverse, most_unsure
from stages.params.shard import Shard
from stages.registry.served_model import read_pixels
from stages.runtime.command import StageError
from stages.training.networks.devices import Compute
from stages.training.networks.models import build, load_classifier, save_classifier

IMAGES = 240
OUT = Path("reports/label_queue")
COPIES = 8
"""Of each of the first twelve pictures, in the pool of repeats: recoded, and a little brighter or darker."""
CONFIG: dict[str, Any] = {
    "architecture": "shufflenet_v2_x0_5", "stem": "half", "image_size": 32, "resize": 36, "mean": [0.5] * 3,
    "std": [0.25] * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model that has learnt something of the built-in sample, and pools of pictures that it has not seen."""
    folder = tmp_path_factory.mktemp("tree")
    files = [file for file in draw("target", 3, 90) if _decodes(file.data)]
    order = np.random.default_rng(0).permutation(len(files))
    train, pool = [files[i] for i in order[:200]], [files[i].data for i in order[200 : 200 + IMAGES]]
    assert len(pool) == IMAGES
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = {"evaluate": {}, "training": {"threads": 1, "precision": "float32"}}
        (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        write_model(folder, train)
        write_pool(folder, "plain", pool)
        write_pool(folder, "repeats", [*pool[:40], *(each for n in range(12) for each in copied(pool[n], n))])
        write_pool(folder, "labelled", pool[:6], label=1)
        yield folder


def write_model(folder: Path, files: list[SampleFile]) -> None:
    """Trained for seconds: right about every other picture."""
    torch.set_num_threads(1)
    names = [file.path.split("/")[1] for file in files]
    config = CONFIG | {"classes": sorted(set(names))}
    pixels = torch.stack([pixels_of(file.data) for file in files])
    labels = torch.tensor([config["classes"].index(name) for name in names])
    model = build(config, seed=1).train()
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(80):
        batch = torch.randint(len(files), (32,), generator=generator)
        logits = model(pixels[batch])
        assert isinstance(logits, torch.Tensor)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
        optimiser.step()
    save_classifier(model, config, folder / "models/finetuned")


def pixels_of(data: bytes) -> torch.Tensor:
    """(3, S, S) uint8 of an image file."""
    return torch.from_numpy(read_pixels(data, CONFIG["resize"], CONFIG["image_size"]).copy()).permute(2, 0, 1)


def _decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.mode == "RGB" and min(image.size) >= 32
    except OSError:
        return False


def copied(data: bytes, seed: int) -> list[bytes]:
    """The same picture, `COPIES` times."""
    generator = np.random.default_rng(seed)
    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened).astype(np.float32)
    made = []
    for quality in range(70, 70 + COPIES):
        file = io.BytesIO()
        shifted = np.clip(pixels + generator.uniform(-2, 2), 0, 255).astype(np.uint8)
        Image.fromarray(shifted).save(file, "JPEG", quality=quality)
        made.append(file.getvalue())
    return made


def write_pool(folder: Path, batch: str, images: list[bytes], label: int = -1) -> None:
    """A shard set of role pretrain, every fifth image of it in val."""
    raw, out = folder / "raw" / batch, folder / "data/shards/pretrain" / batch
    raw.mkdir(parents=True)
    out.mkdir(parents=True)
    rows = []
    with tarfile.open(raw / "all.tar", "w") as tar:
        for number, data in enumerate(images):
            info = tarfile.TarInfo(f"{number:03d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            offset, digest = tar.offset - -(-len(data) // 512) * 512, hashlib.sha256(data).hexdigest()
            split = "train" if number % 5 else "val"
            rows.append((f"{batch}/all/{info.name}", "all.tar", offset, len(data), digest, label, split))
    columns = ["key", "tar", "offset", "bytes", "sha256", "label", "split"]
    write_shard_set(pd.DataFrame(rows, columns=columns), raw, out, Shard(resize=36), "pretrain", batch)


def run(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, out: Path = Path("reports/label_queue")
) -> list[dict[str, str]]:
    """The command, and the list that it writes."""
    monkeypatch.setattr("sys.argv", ["label_queue", *arguments])
    label_queue.main()
    with (out / arguments[0] / "queue.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def margins(tree: Path, batch: str) -> dict[str, float]:
    """1 less the margin of every image of a pool by key, asked one by one."""
    model, _ = load_classifier(tree / "models/finetuned")
    found = {}
    for split in ("train", "val"):
        samples = read_samples([tree / "data/shards/pretrain" / batch], split)
        for i, key in enumerate(samples.key):
            with torch.inference_mode():
                best = model(pixels_of(samples.jpeg(i))[None]).double().softmax(1).topk(2).values[0]
            found[key] = float(1 - (best[0] - best[1]))
    return found


def number(key: str) -> int:
    """Of a picture, by its key."""
    return int(Path(key).stem)


def test_the_queue_prefers_what_the_model_is_unsure_of(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(monkeypatch, "plain", "--count", "12")
    unsure = margins(tree, "plain")
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))
    assert len({row["key"] for row in rows}) == 12
    assert {row["split"] for row in rows} == {"train", "val"}
    for row in rows:
        assert float(row["uncertainty"]) == pytest.approx(unsure[row["key"]], abs=0.02)
        assert float(row["uncertainty"]) == pytest.approx(
            1 - (float(row["probability"]) - float(row["second_probability"])), abs=1e-5
        )
        assert row["class"] != row["second_class"]
    values = sorted(unsure.values())
    chosen = [unsure[row["key"]] for row in rows]
    # Of 240 images the 120 least sure are candidates, and among these the unsure ones come more often.
    assert min(chosen) >= values[IMAGES - 12 * CANDIDATES] - 0.02
    assert np.mean(chosen) > np.mean(values[IMAGES // 2 :]) > np.mean(values) + 0.05
    assert unsure[rows[0]["key"]] == pytest.approx(values[-1], abs=0.02)


def test_the_queue_does_not_pick_near_duplicates(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """108 of the 136 images are twelve pictures; the most unsure ones alone would be a few of them over and over."""

    def picture(key: str) -> int:
        return number(key) if number(key) < 40 else (number(key) - 40) // COPIES

    rows = run(monkeypatch, "repeats", "--count", "16")
    pictures = [picture(row["key"]) for row in rows]
    assert len(rows) == len({row["key"] for row in rows}) == 16
    assert len(set(pictures[:8])) == 8
    assert len(set(pictures)) >= 15
    unsure = margins(tree, "repeats")
    by_uncertainty = sorted(unsure, key=lambda key: -unsure[key])[:16]
    assert len({picture(key) for key in by_uncertainty}) < 11


def test_the_same_seed_gives_the_same_files_and_another_one_another_queue(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tree / "reports/label_queue/plain"
    first = run(monkeypatch, "plain", "--count", "12")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"queue.csv", "queue.html"}
    run(monkeypatch, "plain", "--count", "12", "--out", str(tmp_path / "plain"), out=tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()} == before
    other = run(monkeypatch, "plain", "--count", "12", "--seed", "2", "--out", str(tmp_path / "plain"), out=tmp_path)
    assert [row["key"] for row in other] != [row["key"] for row in first]


@pytest.mark.usefixtures("tree")
def test_the_contact_sheet_is_one_file_with_a_thumbnail_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(monkeypatch, "plain", "--count", "7")
    page = Path("reports/label_queue/plain/queue.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/jpeg;base64,', page)) == 7
    assert re.findall(r'alt="([^"]*)"', page) == [row["key"] for row in rows]
    assert "<script" not in page and "http" not in page
    assert "color-scheme: light dark" in page and "light-dark(" in page
    assert rows[0]["class"] in page


@pytest.mark.usefixtures("tree")
def test_more_than_there_is_gives_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(monkeypatch, "plain", "--count", "1000")
    assert len({row["key"] for row in rows}) == len(rows)
    assert IMAGES * 0.9 < len(rows) <= IMAGES


def test_what_streams_by_is_kept_as_if_all_had_been_there(tree: Path) -> None:
    """However the images come in batches: the forty least sure, in order."""
    model, _ = load_classifier(tree / "models/finetuned")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (300, 3, 32, 32), dtype=np.uint8))
    compute = Compute("cpu", None, False, 1)
    together = most_unsure(model, [images], 40, compute)
    apart = most_unsure(model, images.split(13), 40, compute)
    assert len(together) == 40
    assert (np.diff(together.uncertainty) <= 0).all()
    np.testing.assert_array_equal(np.sort(together.place), np.sort(apart.place))
    np.testing.assert_allclose(together.uncertainty, apart.uncertainty, atol=1e-4)


def test_drawing_goes_by_weight_and_distance() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(8, dtype=np.float32)
    points = np.repeat(centres, 50, axis=0) + generator.normal(0, 0.02, (400, 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    drawn = diverse(points, np.ones(400), 8, seed=1)
    assert sorted(drawn // 50) == list(range(8))  # one of each cluster
    weights = np.ones(400)
    weights[200:] = 0
    assert set(diverse(points, weights, 8, seed=1) // 50) <= {0, 1, 2, 3}
    weights[123] = 2
    assert diverse(points, weights, 8, seed=1)[0] == 123


def test_what_is_the_same_is_drawn_once() -> None:
    points = np.repeat(np.eye(5, dtype=np.float16), 20, axis=0)
    drawn = diverse(points, np.linspace(0.1, 1, 100), 50, seed=3)
    assert sorted(drawn // 20) == [0, 1, 2, 3, 4]
    assert len(diverse(points, np.zeros(100), 50, seed=3)) == 0
    assert len(diverse(points[:0], np.zeros(0), 50, seed=3)) == 0


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("labelled",), "all 6 images of labelled have a label, so there is nothing to queue"),
        (("plian",), r"no shards of a batch 'plian' in data/shards \(found: labelled, plain, repeats\)"),
        (("../plain",), "no shards of a batch"),
        (("plain", "--out", "params.yaml"), "params.yaml is no folder"),
    ],
)
def test_what_is_not_there_cannot_be_queued(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        run(monkeypatch, *arguments)
    assert not Path("reports/label_queue/labelled").exists()


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("arguments", [(), ("plain", "--count", "0"), ("plain", "--seed", "-1")])
def test_a_command_that_is_none_ends_with_its_usage(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["label_queue", *arguments])
    with pytest.raises(SystemExit) as end:
        label_queue.main()
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["model", "shard", "no number"])
def test_without_model_or_shards_nothing_is_written(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    shard = next((tree / "data/shards/pretrain/plain").glob("train-*.tar"))
    path, message = {
        "model": (tree / "models/finetuned/model.safetensors", "holds no model"),
        "shard": (shard, "is missing. Restore it"),
        "no number": (tree / "models/finetuned/model.safetensors", "gives what is not a number"),
    }[what]
    data = path.read_bytes()
    path.unlink()
    if what == "no number":
        path.write_bytes(_without_numbers(data))
    try:
        with pytest.raises(StageError, match=message):
            run(monkeypatch, "plain", "--out", str(tmp_path / "out"))
    finally:
        path.write_bytes(data)
    assert not (tmp_path / "out").exists()


def _without_numbers(weights: bytes) -> bytes:
    from safetensors.torch import load, save

    values: dict[str, Any] = load(weights)
    values["fc.bias"] = torch.full_like(values["fc.bias"], float("nan"))
    return save(values)
