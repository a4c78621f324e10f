"""MixUp and CutMix of batches as they are loaded."""

import torch

from stages.training.loop.mixing import Mixer

IMAGES = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8) * 50
LABELS = torch.tensor([0, 1, 2, 1])


def test_off_it_touches_nothing() -> None:
    images, targets = Mixer(0, 0, 3)(IMAGES, LABELS)
    assert images is IMAGES and targets is LABELS


def test_mixup_mixes_images_and_targets_in_the_same_proportion() -> None:
    torch.manual_seed(1)
    images, targets = Mixer(1.0, 0, 3)(IMAGES, LABELS)
    share = float(targets[1, 1])  # of image 1; the rest is image 0
    assert 0 < share < 1 and float(targets[1, 0]) == 1 - share
    assert torch.allclose(images[1], torch.full((3, 8, 8), 50 * share), atol=1e-4)
    assert torch.allclose(targets.sum(1), torch.ones(4))


def test_cutmix_pastes_a_window_of_the_size_that_the_targets_say() -> None:
    torch.manual_seed(3)
    images, targets = Mixer(0, 1.0, 3)(IMAGES, LABELS)
    assert set(images[1].unique().tolist()) <= {0.0, 50.0}
    assert float((images[1] == 50).float().mean()) == float(targets[1, 1])


def test_with_both_on_each_has_its_turn_and_a_seed_decides() -> None:
    mixer = Mixer(1.0, 1.0, 3)
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        images, targets = mixer(IMAGES, LABELS)
        torch.manual_seed(seed)
        assert torch.equal(mixer(IMAGES, LABELS)[0], images)
        kinds.add(len(images[1].unique()) == 1 and 0 < float(targets[1, 1]) < 1)
    assert kinds == {True, False}
