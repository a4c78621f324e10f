"""Augmentations: drawn from (seed, epoch, place) alone, done to as many images as asked for, and nothing when off."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.data.shards.loading import augmentations
from stages.data.shards.loading.augmentations import Augmentation, choices, needed, random_draws
from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import read_samples
from stages.data.shards.loading.train_loading import TrainLoader
from tests.training.images import dark_and_light

EVERYTHING = Augmentation(policy="rand", rotation=20, jitter=0.5, grey=0.3, blur=0.5, erasing=0.5)
KINDS = {
    "trivial": Augmentation(policy="trivial"),
    "rand": Augmentation(policy="rand", operations=3),
    "views": Augmentation(jitter=0.5, grey=0.2, blur=0.5),
    "everything": EVERYTHING,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images for training."""
    folder = tmp_path_factory.mktemp("shards")
    dark_and_light(folder)
    return folder / "mine"


def epoch(shards: Path, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch, of 10 or 11 images each."""
    settings: dict[str, Any] = {"batch_size": 11, "min_crop_area": 0.5, "seed": 1, "threads": 2, "device": "cpu"}
    number, start = options.pop("epoch", 1), options.pop("start", 0)
    loader = TrainLoader(read_samples([shards], "train"), **settings | options)
    return [(images.clone(), labels) for images, labels in loader.batches(number, start, image_size=24)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_pixels_depend_on_seed_epoch_and_place_alone(kind: str, shards: Path) -> None:
    views = 2 if kind == "views" else 1
    whole = epoch(shards, augmentation=KINDS[kind], views=views)
    assert [len(images) for images, _ in whole] == [11 * views, 11 * views, 10 * views]
    later = epoch(shards, augmentation=KINDS[kind], views=views, start=1, threads=1)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(whole[1:], later, strict=True))
    parts = [epoch(shards, augmentation=KINDS[kind], views=views, rank=rank, world_size=3) for rank in range(3)]
    for number, (images, labels) in enumerate(whole):
        by_view = [part[number][0].unflatten(0, (views, -1)) for part in parts]
        assert torch.equal(torch.cat([view for n in range(views) for view in (each[n] for each in by_view)]), images)
        assert torch.equal(torch.cat([part[number][1] for part in parts]), labels)
    for other in (epoch(shards, augmentation=KINDS[kind], views=views, seed=2),
                  epoch(shards, augmentation=KINDS[kind], views=views, epoch=2)):  # fmt: skip
        assert not torch.equal(whole[0][0], other[0][0])


def test_nothing_on_gives_the_plain_crops(shards: Path) -> None:
    assert not Augmentation().is_on and not needed(Augmentation())
    plain = epoch(shards)
    assert all(
        torch.equal(one[0], two[0]) for one, two in zip(plain, epoch(shards, augmentation=Augmentation()), strict=True)
    )
    assert not torch.equal(plain[0][0], epoch(shards, augmentation=EVERYTHING)[0][0])


def test_an_operation_without_magnitude_changes_hardly_anything(shards: Path) -> None:
    """RandAugment's operations at magnitude 0; equalise and auto-contrast know none, so about two of fourteen do."""
    plain, same = (
        torch.cat([images for images, _ in epoch(shards, augmentation=each)]).float()
        for each in (Augmentation(), Augmentation(policy="rand", operations=1, magnitude=0))
    )
    unchanged = (plain - same).abs().mean(dim=(1, 2, 3)) < 2
    assert unchanged.float().mean() > 0.6


def test_two_views_are_different_crops_of_the_same_images(shards: Path) -> None:
    for images, labels in epoch(shards, views=2):
        first, second = images.chunk(2)
        assert len(first) == len(labels) and not torch.equal(first, second)
        bright = [view.float().mean(dim=(1, 2, 3)) > 128 for view in (first, second)]
        assert torch.equal(*bright) and torch.equal(bright[0], labels == 1)


def test_without_flips_only_the_mirrored_crops_differ(shards: Path) -> None:
    for (images, _), (unflipped, _) in zip(epoch(shards), epoch(shards, flip=False), strict=True):
        same = (images == unflipped).flatten(1).all(dim=1)
        mirrored = (images.flip(3) == unflipped).flatten(1).all(dim=1)
        assert (same | mirrored).all() and same.any() and mirrored.any()


def test_so_many_are_drawn_as_asked_for() -> None:
    found = choices(random_draws(np.random.default_rng(1), 20_000), EVERYTHING)
    assert np.bincount(found.operation.ravel()).min() > 0.9 * 2 * 20_000 / augmentations.OPERATIONS
    assert len(np.bincount(found.operation.ravel())) == augmentations.OPERATIONS
    assert set(found.magnitude.ravel()) == {9} and abs(found.sign.mean() - 0.5) < 0.02
    assert abs(found.angle).max() <= 20 and abs(found.angle.mean()) < 0.5
    assert abs((found.colour[:, 2] == 0).mean() - 0.3) < 0.02
    assert abs((found.colour[:, 0] != 1).mean() - augmentations.JITTERED) < 0.02
    assert abs((found.sigma > 0).mean() - 0.5) < 0.02 and found.sigma.max() <= augmentations.SIGMA[1]
    area = found.erased[:, 2] * found.erased[:, 3]
    assert abs((area > 0).mean() - 0.5) < 0.02
    assert area.max() <= augmentations.ERASED_AREA[1] + 1e-6
    assert (found.erased[:, :2] + found.erased[:, 2:]).max() <= 1 + 1e-6
    trivial = choices(random_draws(np.random.default_rng(1), 20_000), Augmentation(policy="trivial"))
    assert set(trivial.magnitude.ravel()) == set(range(augmentations.BINS))


def test_an_erased_window_is_grey_and_of_the_drawn_size(shards: Path) -> None:
    plain, erased = epoch(shards), epoch(shards, augmentation=Augmentation(erasing=1.0))
    for (before, _), (after, _) in zip(plain, erased, strict=True):
        changed = (before != after).any(dim=1).float().mean(dim=(1, 2))
        assert (changed > 0.01).all() and (changed < 0.42).all()
        assert (after[(before != after)] == augmentations.GREY).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_evaluation_shows_every_image_once_whatever_the_number_of_processes(world_size: int, shards: Path) -> None:
    samples = read_samples([shards], "train")
    settings: dict[str, Any] = {"image_size": 24, "resize": 28, "batch_size": 5, "threads": 1, "device": "cpu"}
    whole = torch.cat([images.clone() for images, _ in evaluation_batches(samples, **settings)])
    parts = [
        images.clone()
        for rank in range(world_size)
        for images, _ in evaluation_batches(samples, **settings, rank=rank, world_size=world_size)
    ]
    assert torch.equal(torch.cat(parts), whole)
