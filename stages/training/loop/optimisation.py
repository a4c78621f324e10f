"""Optimisation: optimisers over groups of parameters, schedules of the learning rate, and the average of weights."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from stages.params.training.recipe import Recipe
from stages.training.networks.layer_groups import Groups

MOMENTUM_FALLS = 0.1
"""Under `one_cycle`, momentum falls by this much until the peak, and rises again (Smith 2018)."""
BIASES_OF_TWO_AXES = "relative_position_bias_table"
"""Attention biases of Swin and MaxViT; they have the shape of a matrix."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024)."""


def optimiser(
    groups: Groups, recipe: Recipe, dtype: torch.dtype | None = None, model: nn.Module | None = None
) -> Optimizer:
    """The recipe's optimiser. Frozen parameters are left out; norms and biases are not decayed (He et al. 2019).

    Args:
        dtype: of autocast; Muon orthogonalises in bf16 where this is bf16, else in float32.
        model: owns the parameters; biases of two axes are known by their names in it.
    """
    named = model.named_parameters() if model else ()
    biases = {id(each) for name, each in named if name.endswith(BIASES_OF_TWO_AXES)}

    def is_weight(parameter: nn.Parameter) -> bool:
        """A weight of a convolution or linear layer; no bias, scale, class token or positions (three axes)."""
        return parameter.ndim in (2, 4) and id(parameter) not in biases

    options = [option for group in groups for option in _options(*group, recipe.weight_decay, is_weight)]
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(options, betas=(recipe.momentum, 0.999))
    if recipe.optimiser == "muon":
        head = {id(parameter) for parameter in groups[-1][0]}
        inner = dtype if dtype == torch.bfloat16 else torch.float32
        return Muon(
            options, recipe.momentum, recipe.muon_scale, lambda each: is_weight(each) and id(each) not in head, inner
        )
    return torch.optim.SGD(options, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _options(
    parameters: list[nn.Parameter], lr: float, weight_decay: float, is_weight: Callable[[nn.Parameter], bool]
) -> list[dict[str, Any]]:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trained if is_weight(parameter)]
    others = [parameter for parameter in trained if not is_weight(parameter)]
    options = [{"params": decayed, "lr": lr, "weight_decay": weight_decay}] if decayed else []
    return options + ([{"params": others, "lr": lr, "weight_decay": 0.0}] if others else [])


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum of a matrix, orthogonalised.

    Convolutions are matrices (out, in·h·w), trained at `scale` times the learning rate. Norms, biases and the head are
    trained by SGD with Nesterov momentum at the learning rate itself. Weight decay is decoupled for all.

    Not torch.optim.Muon: it takes no convolutions, and multiplies in bf16 even where the hardware has no bf16.

    Args:
        dtype: matrices are orthogonalised in it.
    """

    def __init__(
        self,
        options: list[dict[str, Any]],
        momentum: float,
        scale: float,
        is_matrix: Callable[[nn.Parameter], bool],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.scale, self.dtype = scale, dtype
        split = []
        for option in options:
            for matrix in (True, False):
                members = [each for each in option["params"] if is_matrix(each) == matrix]
                if members:
                    split.append(option | {"params": members, "matrix": matrix, "momentum": momentum})
        super().__init__(split, {"momentum": momentum})  # a default, because OneCycleLR looks for it there

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients as they are; `closure` is not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                update = _nesterov(parameter.grad, state["momentum_buffer"], group["momentum"], group["matrix"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if group["matrix"]:
                    rows = len(update)
                    for_shape = max(1.0, rows * rows / update.numel()) ** 0.5
                    update = orthogonalised(update.reshape(rows, -1).to(self.dtype)).view_as(update)
                    parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * self.scale * for_shape)
                else:
                    parameter.add_(update, alpha=-group["lr"])


def _nesterov(gradient: Tensor, buffer: Tensor, momentum: float, average: bool) -> Tensor:
    """The step's direction; updates `buffer`. Muon's momentum is an average, SGD's a sum."""
    if average:
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
    buffer.mul_(momentum).add_(gradient)
    return gradient.add(buffer, alpha=momentum)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix (m, n) with the same singular vectors, and singular values of about 0.7 to 1.2 (Newton-Schulz)."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def schedule(chosen: Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """The recipe's schedule of the learning rate; step it once after each step of the optimiser."""
    steps = recipe.epochs * steps_per_epoch
    rising = recipe.warmup * steps
    if recipe.schedule == "one_cycle":
        peaks = [group["lr"] for group in chosen.param_groups]
        # It needs a step on either side of the peak.
        share = min(max(recipe.warmup, 1 / steps), 1 - 1 / steps)
        momenta: dict[str, Any] = {
            "cycle_momentum": recipe.momentum > 0,
            "max_momentum": recipe.momentum,
            "base_momentum": max(recipe.momentum - MOMENTUM_FALLS, 0.0),
        }
        return OneCycleLR(chosen, peaks, total_steps=max(steps, 3) + 1, pct_start=share, **momenta)

    def warm(step: int) -> float:
        return (step + 1) / (rising + 1) if step < rising else 1.0

    def cosine(step: int) -> float:
        if step < rising:
            return warm(step)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))

    def tenths(step: int) -> float:
        return warm(step) * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)

    return LambdaLR(chosen, cosine if recipe.schedule == "cosine" else tenths)


class Ema:
    """A moving average of a model's weights and buffers (Polyak & Juditsky 1992).

    The decay is warmed up as min(decay, (1 + t) / (10 + t)), so that the start does not dominate a short run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        of_model = model.state_dict()
        average, current = [], []
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                average.append(value)
                current.append(of_model[name])
            else:
                value.copy_(of_model[name])  # a count of batches
        torch._foreach_lerp_(average, current, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs."""
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]
