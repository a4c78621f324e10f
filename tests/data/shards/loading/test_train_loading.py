"""Shards and loading: readable by others, byte-deterministic, every image exactly once, in an order worth the name."""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from stages.data.shards.loading.crops import random_draws, windows
from stages.data.shards.loading.order import epoch_order
from stages.data.shards.loading.samples.dali import settings
from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples, read_samples
from stages.data.shards.loading.samples.shard_sets import check_resize, pooled_statistics, read_index, shard_sets
from stages.data.shards.loading.train_loading import TrainLoader
from stages.data.shards.writing import write_shard_set
from stages.data.sources.parts import Group, SourceFile
from stages.runtime.command import StageError
from tests.raw_tars import scan_tar, write_tar
from tests.shard_batch import SHARD, jpeg


def accepted_batch(folder: Path, count: int) -> pd.DataFrame:
    """Raw tars with `count` images of three classes, and their accepted rows."""
    rows = []
    for label, name in enumerate("abc"):
        images = {f"{number:04d}.x.jpg": jpeg(1000 * label + number) for number in range(label, count, 3)}
        files = [SourceFile(key, partial(io.BytesIO, data)) for key, data in images.items()]
        write_tar(Group("all", name, files), folder)
        rows += [row | {"label": label} for row in scan_tar(folder / "all" / f"{name}.tar", folder, "mine")]
    frame = pd.DataFrame(rows)
    frame["split"] = np.where(np.arange(len(frame)) % 5 == 0, "test", "train")
    return frame


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 75 images."""
    folder = tmp_path_factory.mktemp("mine")
    accepted = accepted_batch(folder / "raw", 75)
    write_shard_set(accepted, folder / "raw", folder / "mine", SHARD, "finetune", "mine")
    accepted.to_pickle(folder / "accepted.pkl")
    return folder / "mine"


def made_up(*sizes: int) -> Samples:
    """Samples of several batches that lie one after the other, as files do."""
    count = sum(sizes)
    empty = np.zeros(count, np.int64)
    return Samples(
        key=[str(number) for number in range(count)], batch=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        batch_names=[f"b{number}" for number in range(len(sizes))], shards=[], shard=empty.astype(np.int32),
        offset=empty, size=empty, label=empty,
    )  # fmt: skip


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = pd.read_pickle(shards.parent / "accepted.pkl").sample(frac=1, random_state=1)  # in any order
    monkeypatch.setenv("SYNSET_WORKERS", "3")
    write_shard_set(accepted, shards.parent / "raw", tmp_path, SHARD, "finetune", "mine")
    for path in shards.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in shards.iterdir())


def test_shards_hold_every_accepted_image_once_with_its_label(shards: Path) -> None:
    accepted = pd.read_pickle(shards.parent / "accepted.pkl")
    index = read_index(shards)
    for split in ("train", "test"):
        samples = read_samples([shards], split)
        expected = accepted[accepted["split"] == split].set_index("key")["label"].to_dict()
        assert dict(zip(samples.key, samples.label.tolist(), strict=True)) == expected
        assert index["splits"][split]["count"] == len(samples) == len(expected)
        assert all(shard["count"] <= 16 for shard in index["splits"][split]["shards"])


def test_plain_tar_webdataset_and_dali_read_them(shards: Path) -> None:
    import webdataset
    from nvidia.dali import fn, pipeline_def

    path = shards / "train-00000.tar"
    names = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.splitlines()
    samples = read_samples([shards], "train")
    assert len(names) == 2 * 16
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [int(sample["cls"]) for sample in theirs] == samples.label[:16].tolist()
    assert [sample["jpg"] for sample in theirs] == [samples.jpeg(number) for number in range(16)]

    @pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def pipeline() -> tuple[Any, ...]:
        index = str(path.with_suffix(".idx"))
        read: Any = fn.readers.webdataset(paths=[str(path)], index_paths=[index], ext=["jpg", "cls"])
        return tuple(read)

    images, labels = pipeline().run()
    assert [bytes(images.at(number)) for number in range(16)] == [samples.jpeg(number) for number in range(16)]
    assert [int(bytes(labels.at(number))) for number in range(16)] == samples.label[:16].tolist()


def test_channel_statistics_are_those_of_the_training_pixels(shards: Path) -> None:
    samples = read_samples([shards], "train")
    pixels = np.concatenate(
        [np.asarray(Image.open(io.BytesIO(samples.jpeg(i)))).reshape(-1, 3) / 255 for i in range(len(samples))]
    )
    index = read_index(shards)
    # They are of the pixels before compression, and noise loses colour in it.
    assert index["mean"] == pytest.approx(pixels.mean(0).tolist(), abs=2e-3)
    assert index["std"] == pytest.approx(pixels.std(0).tolist(), abs=1e-2)
    assert pooled_statistics([index, index]) == {"mean": index["mean"], "std": pytest.approx(index["std"], abs=1e-5)}


def test_evaluation_sees_every_image_once_and_as_pil_does(shards: Path) -> None:
    samples = read_samples([shards], "test")
    batches = list(evaluation_batches(samples, image_size=32, resize=40, batch_size=4, threads=2, device="cpu"))
    images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    assert images.shape == (15, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == samples.label.tolist()
    for number in range(len(samples)):
        image = Image.open(io.BytesIO(samples.jpeg(number)))
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        expected = np.asarray(image.crop((left, top, left + 32, top + 32))).astype(int)
        assert np.abs(images[number].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 2


@pytest.mark.gpu
def test_the_gpu_sees_what_the_cpu_sees(shards: Path) -> None:
    test, train = (read_samples([shards], split) for split in ("test", "train"))
    loader = partial(TrainLoader, train, batch_size=7, min_crop_area=0.3, seed=3, threads=2)

    def crops(device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return loader(device=device).batches(epoch=1, start=0, image_size=32)

    whole = partial(evaluation_batches, test, image_size=32, resize=40, batch_size=4, threads=2)
    for batches in (crops, whole):
        cpu, gpu = (torch.cat([images.cpu() for images, _ in batches(device=each)]) for each in ("cpu", "cuda"))
        assert (cpu.float() - gpu.float()).abs().mean() < 3


def epoch(shards: Path, number: int, threads: int = 2, start: int = 0, **part: Any) -> list[tuple[Any, Any]]:
    """Images and labels of the batches of one epoch of training."""
    loader = loader_of(read_samples([shards], "train"), threads=threads, **part)
    return [(images.clone(), labels) for images, labels in loader.batches(number, start, image_size=32)]


def loader_of(samples: Samples, threads: int = 2, **part: Any) -> TrainLoader:
    """Batches of 6 or 7 images."""
    return TrainLoader(samples, batch_size=7, min_crop_area=0.5, seed=3, threads=threads, device="cpu", **part)


def joined(batches: list[tuple[Any, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and all labels."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_sees_every_image_once_and_depends_on_its_number_alone(shards: Path) -> None:
    batches = epoch(shards, 1)
    assert {len(labels) for _, labels in batches} <= {7, 6}
    images, labels = joined(batches)
    assert images.shape[1:] == (3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert sorted(labels.tolist()) == sorted(read_samples([shards], "train").label.tolist())
    again, _ = joined(epoch(shards, 1, threads=1))
    assert torch.equal(images, again)
    other, _ = joined(epoch(shards, 2))
    assert not torch.equal(images, other)


@pytest.mark.parametrize("start", [0, 1, 4, 8])
def test_an_epoch_goes_on_from_any_batch(shards: Path, start: int) -> None:
    whole, rest = epoch(shards, 1), epoch(shards, 1, start=start)
    assert len(whole) == 9
    assert len(rest) == 9 - start
    for (images, labels), (others, theirs) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, theirs)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_batch_and_see_the_same_pixels_as_one(shards: Path, world_size: int) -> None:
    alone = epoch(shards, 1)
    parts = [epoch(shards, 1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number, (images, labels) in enumerate(alone):
        together = joined([part[number] for part in parts])
        assert torch.equal(images, together[0])
        assert torch.equal(labels, together[1])
        assert max(len(part[number][1]) for part in parts) - min(len(part[number][1]) for part in parts) <= 1


def test_a_shard_that_changes_while_it_is_read_is_named(shards: Path, tmp_path: Path) -> None:
    samples = read_samples([shutil.copytree(shards, tmp_path / "mine")], "train")
    last = int(samples.offset.argmax())
    shard = samples.shards[samples.shard[last]]
    os.truncate(shard, int(samples.offset[last]) + 10)
    with pytest.raises(StageError, match=rf"{shard} was changed while it was read. Restore it: `rm -rf .*mine && dvc"):
        samples.jpeg(last)
    shard.unlink()
    with pytest.raises(StageError, match=r"cannot be read \(No such file"):
        list(loader_of(samples).batches(epoch=1, start=0, image_size=32))


def test_several_gpus_decode_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert settings(7, 2, "cuda")["device_id"] == 3
    assert settings(7, 2, "cpu")["device_id"] is None


def test_more_processes_than_images_of_a_batch_are_refused(shards: Path) -> None:
    with pytest.raises(StageError, match="9 processes cannot share a batch of 6"):
        epoch(shards, 1, rank=0, world_size=9)


def test_the_order_is_new_each_epoch() -> None:
    samples = made_up(3000)
    orders = [epoch_order(samples, seed=1, epoch=number) for number in (1, 2)]
    for order in orders:
        assert sorted(order) == list(range(3000))
        assert abs(spearmanr(order, np.arange(3000)).statistic) < 0.1
    assert abs(spearmanr(*orders).statistic) < 0.1
    assert not np.array_equal(orders[0], epoch_order(samples, seed=2, epoch=1))


def test_any_2000_consecutive_samples_hold_every_batch_in_proportion() -> None:
    samples = made_up(20_000, 700, 300)
    order = epoch_order(samples, seed=1, epoch=1)
    assert sorted(order) == list(range(21_000))
    for batch, size in enumerate((20_000, 700, 300)):
        counts = np.convolve(samples.batch[order] == batch, np.ones(2000), "valid")
        expected = 2000 * size / 21_000
        assert 0.8 * expected <= counts.min()
        assert counts.max() <= 1.2 * expected


def test_a_half_made_shard_set_is_none(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", ".later.tmp"):
        shutil.copytree(shards, tmp_path / "data/shards/finetune" / name)
    assert [path.name for path in shard_sets("finetune")] == ["mine"]
    check_resize(shard_sets("finetune"), 40)
    with pytest.raises(StageError, match=r"`model.image_size` is 48.*`shard.finetune.resize` 40"):
        check_resize(shard_sets("finetune"), 48)


def test_unlabelled_images_are_kept_apart(tmp_path: Path) -> None:
    accepted = accepted_batch(tmp_path / "raw", 9).assign(split="train")
    accepted.loc[accepted.index[:4], "label"] = -1
    write_shard_set(accepted, tmp_path / "raw", tmp_path / "mine", SHARD, "pretrain", "mine")
    samples = read_samples([tmp_path / "mine"], "train")
    assert len(samples) == 9
    assert len(samples.labelled()) == 5
    assert json.loads((tmp_path / "mine/index.json").read_text(encoding="utf-8"))["labels"]["train"]["-1"] == 4


def test_every_training_image_is_its_window_and_has_its_label(shards: Path) -> None:
    samples = read_samples([shards], "train")
    batches = epoch(shards, 2)
    order = np.array_split(epoch_order(samples, seed=3, epoch=2), len(batches))
    for number, ((images, labels), members) in enumerate(zip(batches, order, strict=True)):
        drawn = random_draws(np.random.default_rng([3, 2, 1, number]), len(members), 0.5)
        pictures = [Image.open(io.BytesIO(samples.jpeg(member))) for member in members]
        found = windows(drawn, np.array([(each.height, each.width) for each in pictures]))
        assert labels.tolist() == samples.label[members].tolist()
        for place, picture in enumerate(pictures):
            (row, column), (high, wide) = found.anchor[place].tolist(), found.shape[place].tolist()
            crop = picture.crop((column, row, column + wide, row + high)).resize((32, 32), Image.Resampling.BILINEAR)
            expected = np.asarray(crop).astype(int)
            expected = expected[:, ::-1] if found.mirrored[place] else expected
            assert np.abs(images[place].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 4
