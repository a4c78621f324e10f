"""Shards: what an image becomes in one, and what an interrupted run leaves to the next."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFilter

from stages.data.raw.images import resize_shorter, to_rgb, upright_pixels
from stages.data.shards import writing
from stages.data.shards.loading.samples.shard_sets import read_index
from stages.data.shards.writing import shard_image, write_shard_set
from stages.params.shard import Shard
from stages.runtime.command import StageError
from tests.shard_batch import SHARD, accepted_batch, jpeg


def drawn(width: int, height: int) -> Image.Image:
    """Edges, curves, a slope and fine texture, blurred as by a lens."""
    rng = np.random.default_rng(1)
    slope = np.linspace(60, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    image = Image.fromarray(np.clip(slope + rng.normal(0, 6, slope.shape), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, size = (int(value) for value in rng.integers((0, 0, 8), (width, height, 90)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + size, y + size // 2), outline=colour, width=2)
        draw.line((x, y, y, x), fill=colour, width=1)
    return image.filter(ImageFilter.GaussianBlur(0.7))


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """Of high quality where it is lossy."""
    file = io.BytesIO()
    image.save(file, form, **({"quality": 95, "subsampling": "4:4:4"} if form == "JPEG" else {}) | options)
    return file.getvalue()


def decibels(found: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio."""
    return float(10 * np.log10(255**2 / np.mean((found.astype(float) - reference.astype(float)) ** 2)))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 426), (1024, 768)])
def test_little_is_lost(size: tuple[int, int]) -> None:
    data = encoded(drawn(*size))
    written, _ = shard_image(data, 256, 90)
    small = np.asarray(Image.open(io.BytesIO(written)))
    assert min(small.shape[:2]) == 256
    whole = Image.open(io.BytesIO(data))
    reference = np.asarray(whole.resize((small.shape[1], small.shape[0]), Image.Resampling.LANCZOS))
    bicubic = encoded(
        whole.resize((small.shape[1], small.shape[0]), Image.Resampling.BICUBIC), quality=90, subsampling="4:2:0"
    )
    assert decibels(small, reference) > decibels(np.asarray(Image.open(io.BytesIO(bicubic))), reference) - 1.5
    pixels = np.asarray(whole)
    by_area = cv2.resize(pixels, (small.shape[1], small.shape[0]), interpolation=cv2.INTER_AREA)
    assert decibels(resize_shorter(pixels, 256), reference) > max(38, decibels(by_area, reference))


def test_what_is_small_baseline_rgb_is_passed_through_and_all_else_becomes_so() -> None:
    small = jpeg(1, (40, 30))
    written, pixels = shard_image(small, 40, 90)
    assert written == small
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(small))))
    turned = Image.Exif()
    turned[0x0112] = 6
    for other in (
        jpeg(1, (90, 60)), jpeg(1, (40, 30), progressive=True), jpeg(1, (40, 30), "L"), jpeg(1, (40, 30), "CMYK"),
        jpeg(1, (40, 30), form="PNG"), jpeg(1, (40, 30), form="WEBP"), jpeg(1, (40, 30), exif=turned),
        jpeg(1, (90, 60), "L"), jpeg(1, (90, 60), "CMYK"), jpeg(1, (90, 60), "P", form="GIF"),
    ):  # fmt: skip
        written, pixels = shard_image(other, 40, 90)
        with Image.open(io.BytesIO(written)) as image:
            assert (image.format, image.mode, image.info.get("progressive")) == ("JPEG", "RGB", None)
            assert min(image.size) <= 40
            assert not image.getexif()
            assert image.size == pixels.shape[1::-1]
            assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 12


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_every_orientation_is_upright(number: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(drawn(70, 50), form, exif=exif)
    pixels, as_it_is = upright_pixels(data)
    np.testing.assert_array_equal(pixels, np.asarray(to_rgb(data)))
    assert as_it_is == (form == "JPEG" and number == 1)


def test_the_shorter_side_is_resized_and_nothing_enlarged() -> None:
    def size(height: int, width: int, side: int) -> tuple[int, ...]:
        return resize_shorter(np.zeros((height, width, 3), np.uint8), side).shape

    assert size(100, 200, 50) == (50, 100, 3)
    assert size(999, 101, 100) == (989, 100, 3)
    assert size(10, 20, 50) == (10, 20, 3)
    assert size(51, 40_000, 50) == (50, 39_216, 3)  # above what some of OpenCV's resizing takes


def test_an_even_grey_stays_as_it_is() -> None:
    for level in (0, 77, 255):
        for size in ((99, 83), (300, 210), (520, 1000)):
            assert np.unique(resize_shorter(np.full((*size, 3), level, np.uint8), 64)).tolist() == [level]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (61, 47), (700, 900)])
def test_sums_of_pixels_are_exact(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for pixels in (rng.integers(0, 256, (*size, 3), dtype=np.uint8), np.full((*size, 3), 255, np.uint8)):
        found, values = writing._pixel_sums(pixels), pixels.reshape(-1, 3).astype(np.int64)
        assert found == [len(values), *values.sum(0).tolist(), *(values**2).sum(0).tolist()]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw tars, accepted rows and the undisturbed shard set of 40 images."""
    folder = tmp_path_factory.mktemp("batch")
    accepted = accepted_batch(folder / "raw", 40)
    accepted.to_pickle(folder / "accepted.pkl")
    write(folder, folder / "out")
    return folder


def write(batch: Path, out: Path, work: Path | None = None, raw: Path | None = None) -> None:
    """The shard set of the batch, at `out`."""
    accepted = pd.read_pickle(batch / "accepted.pkl")
    write_shard_set(accepted, raw or batch / "raw", out, SHARD, "finetune", "mine", work)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_channel_statistics_are_those_of_the_pixels_before_compression(batch: Path) -> None:
    accepted = pd.read_pickle(batch / "accepted.pkl")
    pixels = []
    for row in accepted[accepted["split"] == "train"].itertuples():
        with (batch / "raw" / str(row.tar)).open("rb") as tar:
            tar.seek(row.offset)
            pixels.append(shard_image(tar.read(row.bytes), 40, 90)[1].reshape(-1, 3) / 255)
    index = read_index(batch / "out")
    assert index["mean"] == pytest.approx(np.concatenate(pixels).mean(0).tolist(), abs=1e-6)
    assert index["std"] == pytest.approx(np.concatenate(pixels).std(0).tolist(), abs=1e-6)


def stopped(batch: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in progress whose shards are all finished, of a run that ended before they came into place."""

    def stop(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(writing, "move_directory", stop)
        with pytest.raises(InterruptedError):
            write(batch, work.with_name("never"), work)


def written_when(work: Path) -> dict[str, int]:
    """Of each shard."""
    return {path.name: path.stat().st_mtime_ns for path in work.glob("shards/*.tar")}


def test_finished_shards_are_taken_up_and_no_trace_of_the_work_is_left(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(batch, tmp_path / "work", monkeypatch)
    before = written_when(tmp_path / "work")
    assert len(before) == 3
    write(batch, tmp_path / "out", tmp_path / "work")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    assert contents(tmp_path / "out") == contents(batch / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["shard", "index file", "no shard", "entry", "other processor"])
def test_a_finished_shard_that_is_not_whole_is_written_again(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    work = tmp_path / "work"
    stopped(batch, work, monkeypatch)
    before = written_when(work)
    tar, entry = work / "shards/train-00001.tar", work / "entries/train-00001.json"
    if damage == "shard":
        data = bytearray(tar.read_bytes())
        data[3000] ^= 1
        tar.write_bytes(data)
        os.utime(tar, ns=(before[tar.name], before[tar.name]))
    if damage == "index file":
        tar.with_suffix(".idx").write_text("v1.2 0\n")
    if damage == "no shard":
        tar.unlink()
    if damage == "entry":
        entry.unlink()
    if damage == "other processor":
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"processor": "another"}))
    write(batch, tmp_path / "out", work)
    after = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before}
    assert [name for name in before if after[name] != before[name]] == [tar.name]
    assert contents(tmp_path / "out") == contents(batch / "out")


def test_what_was_in_place_when_only_tidying_up_was_left_is_taken_up(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    stopped(batch, work, monkeypatch)
    (work / "shards").rename(tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    write(batch, tmp_path / "out", work)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")} == before
    assert contents(tmp_path / "out") == contents(batch / "out")


def test_an_older_set_at_its_place_is_replaced(batch: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-00099.tar").write_bytes(b"older")
    write(batch, tmp_path / "out", tmp_path / "work")
    assert contents(tmp_path / "out") == contents(batch / "out")


def test_a_damaged_raw_tar_is_named_and_what_is_finished_is_kept(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNSET_WORKERS", "1")
    raw = tmp_path / "raw"
    shutil.copytree(batch / "raw", raw)
    accepted = pd.read_pickle(batch / "accepted.pkl")
    row = accepted[accepted["split"] == "test"].iloc[0]
    with (raw / row["tar"]).open("r+b") as tar:
        tar.seek(row["offset"] + row["bytes"] // 2)
        tar.write(b"\0damaged\0")
    with pytest.raises(StageError, match=rf"{row['tar']} is damaged: {row['key']}.*dvc checkout --force {raw}"):
        write(batch, tmp_path / "out", tmp_path / "work", raw)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "work/entries").iterdir()) == [
        "train-00000.json", "train-00001.json",
    ]  # fmt: skip
    assert not list((tmp_path / "work/aside").iterdir())
    write(batch, tmp_path / "out", tmp_path / "work")
    assert contents(tmp_path / "out") == contents(batch / "out")


def test_the_section_names_a_scheduler_or_none() -> None:
    from stages.params.shard import Shards
    from stages.runtime.params_file import ParamsError, check

    roles = {"pretrain": {"resize": 64}, "finetune": {"resize": 64}}
    for cluster in (None, "tcp://10.0.0.1:8786", "tls://scheduler:8786"):
        assert check("shard", roles | {"cluster": cluster}, Shards).cluster == cluster
    assert check("shard", roles, Shards).cluster is None
    for wrong in ("scheduler:8786", "tcp://scheduler", 8786):
        with pytest.raises(ParamsError, match=r"shard\.cluster"):
            check("shard", roles | {"cluster": wrong}, Shards)
    assert Shard(resize=64).quality == 90
