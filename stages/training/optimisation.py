"""Optimisation: SGD with Nesterov momentum under a one-cycle schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

MOMENTUM = 0.9


def sgd(groups: Iterable[tuple[list[nn.Parameter], float]], weight_decay: float) -> torch.optim.SGD:
    """SGD over groups of (parameters, peak learning rate); norms and biases are not decayed (He et al. 2019)."""
    options = []
    for parameters, lr in groups:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.ndim > 1]
        others = [parameter for parameter in trained if parameter.ndim <= 1]
        options += [{"params": decayed, "lr": lr, "weight_decay": weight_decay}] if decayed else []
        options += [{"params": others, "lr": lr, "weight_decay": 0.0}] if others else []
    return torch.optim.SGD(options, momentum=MOMENTUM, nesterov=True)


def one_cycle(optimiser: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear from near 0 to the peak in the first `warmup` share of `steps`, then a half cosine to 0 (Smith 2018)."""
    rising = warmup * steps

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
