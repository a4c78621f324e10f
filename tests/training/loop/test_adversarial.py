"""Adversarial images: within bounds, worse than noise; and the guard against catastrophic overfitting."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stages.params.training.recipe import Adversarial
from stages.training.loop import adversarial
from stages.training.loop.adversarial import LARGEST_GAP, Guard
from stages.training.networks.attacks import attacked, count_robust

METHODS = [Adversarial(method="fgsm", epsilon=8), Adversarial(method="pgd", epsilon=8, steps=5)]


class Net(nn.Module):
    """Takes images in 0..255, as all do here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(4),
            nn.Flatten(), nn.Linear(128, 2),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, 2)."""
        return self.layers((images.float() - 128) / 64)


def stripes(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Faint stripes in noise, upright or level, (n, 3, 16, 16) uint8, and which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    wave = 6 * torch.sign(torch.sin(torch.arange(16) * 1.6))
    pattern = torch.where(labels[:, None, None] == 1, wave[None, None, :], wave[None, :, None])
    noise = 12 * torch.randn(count, 3, 16, 16, generator=generator)
    return (128 + pattern[:, None] + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained() -> Net:
    """A network that tells the stripes."""
    net = Net()
    by = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(60):
        images, labels = stripes(64, step)
        by.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        by.step()
    return net.eval()


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings.method)
def test_attacks_stay_within_bounds_and_leave_the_network_as_it_was(settings: Adversarial, trained: Net) -> None:
    images, labels = stripes(8)
    images[0], images[1] = 0, 255
    trained.train()
    trained.layers[1].eval()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    found = attacked(trained, images, labels, settings)
    assert found.dtype == torch.float32 and found.shape == images.shape
    assert (found - images.float()).abs().max() <= 8 + 1e-4
    assert found.min() >= 0 and found.max() <= 255
    assert [module.training for module in trained.layers[:4]] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(weights.grad is None or not found.requires_grad for weights in trained.parameters())
    trained.eval()


def test_an_attack_is_worse_than_noise_and_pgd_is_worse_than_fgsm(trained: Net) -> None:
    images, labels = stripes(256, seed=99)

    def hits(pixels: torch.Tensor) -> int:
        with torch.no_grad():
            return int((trained(pixels).argmax(1) == labels).sum())

    torch.manual_seed(1)
    noise = (images.float() + 8 * torch.sign(torch.randn(images.shape))).clamp(0, 255)
    fgsm, pgd = (hits(attacked(trained, images, labels, settings)) for settings in METHODS)
    assert hits(images) > 0.95 * 256
    assert pgd <= fgsm < hits(noise) - 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_attack_is_not_blind_where_the_network_is_sure(trained: Net, dtype: torch.dtype) -> None:
    """Logits a hundred times as large change no decision, but make the gradient of cross-entropy vanish."""
    sure = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in sure.layers[-1].parameters():
            parameter.mul_(100)
    images, labels = stripes(256, seed=99)

    def hits(net: Net) -> int:
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            worst = attacked(net, images, labels, METHODS[1])
        with torch.no_grad():
            return int((net(worst).argmax(1) == labels).sum())

    assert hits(sure) <= hits(trained) + 5


def test_robust_top1_is_the_same_whatever_was_drawn_before(trained: Net) -> None:
    images, labels = stripes(64)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(int(count_robust(trained, images, labels, METHODS[0], seed=7)))
        assert torch.initial_seed() == seed
    assert found[0] == found[1]


def test_the_guard_goes_to_pgd_where_only_fgsm_is_withstood_and_back(
    trained: Net, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Counts stand in for networks: one that has overfitted in this way takes minutes to train."""
    images, labels = stripes(10)
    counts = iter([10, 3, 9, 8, 10, 3, 9, 8])
    monkeypatch.setattr(adversarial, "count_correct", lambda *_: torch.tensor(next(counts)))
    guard, settings = Guard(), METHODS[0]
    caplog.set_level("INFO")
    guard.attacked(trained, images, labels, settings, step=0)
    assert guard.on_pgd and LARGEST_GAP < (10 - 3) / 10
    assert "100 % withstand FGSM, 30 % PGD: training on PGD" in caplog.text
    again = Guard()
    again.load_state_dict(guard.state_dict())
    again.attacked(trained, images, labels, settings, step=7)  # between two looks nothing changes
    assert again.on_pgd
    again.attacked(trained, images, labels, settings, step=20)
    assert not again.on_pgd and "back to FGSM" in caplog.text
    again.attacked(trained, images, labels, settings, step=40)
    assert again.on_pgd
    again.attacked(trained, images, labels, settings, step=60)
    assert again.on_pgd, "the second time it lasts twice as long"
    again.attacked(trained, images, labels, settings, step=80)
    assert not again.on_pgd
