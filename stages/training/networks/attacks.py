"""Attacks: images changed by a little so that a network misclassifies them (all in units of pixels, 0..255).

`pgd` is Madry et al. 2018. `fgsm` is one step from a random start (Wong, Rice & Kolter 2020).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stages.params.training.recipe import Adversarial


def attacked(model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, steps: int = 0) -> Tensor:
    """Attacked images, (n, 3, H, W) float32 within epsilon of `images` and in 0..255.

    Args:
        model: takes images in 0..255; gives logits (n, C).
        steps: of PGD; 0: as the settings say for training.
    """
    if settings.method == "fgsm" and not steps:
        return _perturbed(model, images, labels, settings.epsilon, 1, settings.step_size or 1.25 * settings.epsilon)
    steps = steps or settings.steps
    return _perturbed(model, images, labels, settings.epsilon, steps, _pgd_step(settings, steps))


def count_robust(model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, seed: int) -> Tensor:
    """How many images are still classified correctly under PGD of `val_steps`, () int64.

    The random start depends on `seed` alone.
    """
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        steps = settings.val_steps
        worst = _perturbed(model, images, labels, settings.epsilon, steps, 2.5 * settings.epsilon / steps)
        return count_correct(model, worst, labels)


def count_correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """How many images the model, in evaluation mode, classifies correctly, () int64."""
    with torch.no_grad(), _evaluating(model):
        return (model(images).argmax(1) == labels).sum()


def _pgd_step(settings: Adversarial, steps: int) -> float:
    return settings.step_size if settings.step_size and settings.method == "pgd" else 2.5 * settings.epsilon / steps


def _perturbed(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, steps: int, step_size: float
) -> Tensor:
    """Steps of size `step_size` along the sign of the gradient, from a random start, within `epsilon`."""
    clean = images.float()
    change = torch.empty_like(clean).uniform_(-epsilon, epsilon)
    with _evaluating(model):
        for _ in range(steps):
            change = _within(clean, change, epsilon).requires_grad_(True)
            with torch.enable_grad():
                confusion = _confusion(model(clean + change), labels).sum()
            (gradient,) = torch.autograd.grad(confusion, change)
            change = change.detach() + step_size * gradient.sign()
    return clean + _within(clean, change, epsilon)


def _confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds against the label, (n,) float32; the attack raises them.

    Cross-entropy is log(1 + exp(this)), so gradients have the same signs; but the gradients of cross-entropy vanish
    where the network is sure of the label, and an attack that follows zeros makes the network look robust.
    """
    own = labels[:, None]
    return logits.float().scatter(1, own, -torch.inf).logsumexp(1) - logits.float().gather(1, own)[:, 0]


def _within(clean: Tensor, change: Tensor, epsilon: float) -> Tensor:
    """The change, at most epsilon a pixel, and never below 0 or above 255."""
    return (clean + change.clamp(-epsilon, epsilon)).clamp(0, 255) - clean


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """An attack neither moves running statistics nor depends on dropout; each module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
