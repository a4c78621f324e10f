"""Adversarial training: images changed by a little, so that the network mistakes them (all in units of pixels, 0..255).

`pgd` is Madry et al. 2018. `fgsm` is Wong, Rice & Kolter 2020: one step from a random start. It costs a fraction, and
may suddenly learn to fool its own single step while it loses all robustness (catastrophic overfitting). `Guard` looks
for that and trains on PGD until it is over (Li et al. 2020, "Towards Understanding Fast Adversarial Training").
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.params.training.recipe import Adversarial
from stages.training.loop.processes import is_first, summed

logger = logging.getLogger(__name__)
LOOK_EVERY = 20
"""Steps between two looks of the guard."""
LOOK_STEPS = 5
"""Of the PGD that it compares with."""
LARGEST_GAP = 0.2
"""Share of a batch by which accuracy under FGSM may exceed that under PGD."""


def attacked(model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, steps: int = 0) -> Tensor:
    """Images that training sees instead of `images`, (n, 3, H, W) float32 within epsilon of them and in 0..255.

    Args:
        model: takes images in 0..255; gives logits (n, C).
        steps: of PGD; 0: as the settings say for training.
    """
    if settings.method == "fgsm" and not steps:
        return _perturbed(model, images, labels, settings.epsilon, 1, settings.step_size or 1.25 * settings.epsilon)
    steps = steps or settings.steps
    return _perturbed(model, images, labels, settings.epsilon, steps, _pgd_step(settings, steps))


def robust_hits(model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, seed: int) -> Tensor:
    """How many images are still recognised under PGD of `val_steps`, () int64; its start depends on `seed` alone."""
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        steps = settings.val_steps
        worst = _perturbed(model, images, labels, settings.epsilon, steps, 2.5 * settings.epsilon / steps)
        return _hits(model, worst, labels)


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
    """What an attack raises, (n,) float32: log-odds against the label.

    Cross-entropy is log(1 + exp(this)), so gradients have the same signs; but that one's vanish where the network is
    sure of the label, and an attack that follows zeros makes the network look robust.
    """
    own = labels[:, None]
    return logits.float().scatter(1, own, -torch.inf).logsumexp(1) - logits.float().gather(1, own)[:, 0]


def _within(clean: Tensor, change: Tensor, epsilon: float) -> Tensor:
    """The change, at most epsilon a pixel, and never below 0 or above 255."""
    return (clean + change.clamp(-epsilon, epsilon)).clamp(0, 255) - clean


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """An attack neither moves running statistics nor is thrown off by dropout; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad(), _evaluating(model):
        return (model(images).argmax(1) == labels).sum()


class Guard:
    """Against catastrophic overfitting of FGSM.

    Every `LOOK_EVERY` steps the batch is attacked in both ways. Where the network withstands FGSM much more often than
    PGD, the steps until the next look train on PGD. Each time that FGSM has overfitted again this lasts twice as long:
    a network that has found its way around FGSM soon finds it again.
    """

    def __init__(self) -> None:
        self.on_pgd = False
        self.next_look = 0
        """Step of all epochs."""
        self.relapses = 0

    def attacked(self, model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, step: int) -> Tensor:
        """As the function of this name, by the attack that is called for at this step of all epochs (from 0)."""
        if step >= self.next_look:
            self._look(model, images, labels, settings, step)
        return attacked(model, images, labels, settings, steps=LOOK_STEPS if self.on_pgd else 0)

    def _look(self, model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, step: int) -> None:
        one, many = (
            _hits(model, attacked(model, images, labels, settings, steps), labels) for steps in (0, LOOK_STEPS)
        )
        counts = torch.stack([one, many, torch.tensor(len(labels), device=one.device)]).double()
        by_fgsm, by_pgd, count = summed(counts).tolist()  # over all processes, which must decide alike
        overfits = (by_fgsm - by_pgd) / count > LARGEST_GAP
        if overfits != self.on_pgd and is_first():
            what = "training on PGD until that is over" if overfits else "back to FGSM"
            logger.info(
                "step %d: %.0f %% withstand FGSM, %.0f %% PGD: %s",
                step,
                100 * by_fgsm / count,
                100 * by_pgd / count,
                what,
            )
        self.relapses += overfits and not self.on_pgd
        self.on_pgd = overfits
        self.next_look = step + LOOK_EVERY * (2 ** (self.relapses - 1) if overfits else 1)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs."""
        return {"on_pgd": self.on_pgd, "next_look": self.next_look, "relapses": self.relapses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.on_pgd, self.next_look, self.relapses = state["on_pgd"], state["next_look"], state["relapses"]
