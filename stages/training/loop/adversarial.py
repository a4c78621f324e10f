"""Adversarial training on FGSM, with a guard against catastrophic overfitting.

FGSM costs a fraction of PGD, and may suddenly learn to fool its own single step while it loses all robustness
(catastrophic overfitting). `Guard` checks for that and trains on PGD until it is over (Li et al. 2020, "Towards
Understanding Fast Adversarial Training").
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from stages.params.training.recipe import Adversarial
from stages.training.loop.processes import is_first, summed
from stages.training.networks.attacks import attacked, count_correct

logger = logging.getLogger(__name__)
CHECK_EVERY = 20
"""Steps between two checks of the guard."""
CHECK_STEPS = 5
"""Steps of the PGD that the guard compares with."""
LARGEST_GAP = 0.2
"""Share of a batch by which accuracy under FGSM may exceed that under PGD."""


class Guard:
    """Against catastrophic overfitting of FGSM.

    Every `CHECK_EVERY` steps the batch is attacked in both ways. Where the network withstands FGSM much more often than
    PGD, the steps until the next check train on PGD. Each time that FGSM has overfitted again this lasts twice as long:
    a network that has found its way around FGSM soon finds it again.
    """

    def __init__(self) -> None:
        self.on_pgd = False
        self.next_check = 0
        """Step of all epochs."""
        self.relapses = 0

    def attacked(self, model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, step: int) -> Tensor:
        """As `attacks.attacked`, by the attack that this step of all epochs (from 0) needs."""
        if step >= self.next_check:
            self._check(model, images, labels, settings, step)
        return attacked(model, images, labels, settings, steps=CHECK_STEPS if self.on_pgd else 0)

    def _check(self, model: nn.Module, images: Tensor, labels: Tensor, settings: Adversarial, step: int) -> None:
        one, many = (
            count_correct(model, attacked(model, images, labels, settings, steps), labels) for steps in (0, CHECK_STEPS)
        )
        counts = torch.stack([one, many, torch.tensor(len(labels), device=one.device)]).double()
        by_fgsm, by_pgd, count = summed(counts).tolist()  # over all processes, which must decide alike
        overfits = (by_fgsm - by_pgd) / count > LARGEST_GAP
        if overfits != self.on_pgd and is_first():
            action = "training on PGD until that is over" if overfits else "back to FGSM"
            shares = 100 * by_fgsm / count, 100 * by_pgd / count
            logger.info("step %d: %.0f %% withstand FGSM, %.0f %% PGD: %s", step, *shares, action)
        self.relapses += overfits and not self.on_pgd
        self.on_pgd = overfits
        self.next_check = step + CHECK_EVERY * (2 ** (self.relapses - 1) if overfits else 1)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs."""
        return {"on_pgd": self.on_pgd, "next_check": self.next_check, "relapses": self.relapses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.on_pgd, self.next_check, self.relapses = state["on_pgd"], state["next_check"], state["relapses"]
