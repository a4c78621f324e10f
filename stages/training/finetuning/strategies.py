"""Strategies of fine-tuning: which weights are trained, and how fast. One function a strategy, all of one shape.

Each returns groups of parameters with their peak learning rate; the last group is the head's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stages.params.finetune import Finetune
from stages.runtime.command import StageError
from stages.training.networks.layer_groups import NORMS, Groups, blocks, of_a_head, of_head
from stages.training.networks.models import Classifier


def head(model: Classifier, finetune: Finetune) -> Groups:
    """The new head alone; the backbone stays as it is."""
    model.requires_grad_(False)
    return [(_trained(of_head(model)), finetune.lr)]


def last_block(model: Classifier, finetune: Finetune) -> Groups:
    """The head and the block before it."""
    model.requires_grad_(False)
    return [(_trained(blocks(model)[-1]), finetune.backbone_lr), (_trained(of_head(model)), finetune.lr)]


def full(model: Classifier, finetune: Finetune) -> Groups:
    """Every weight; each earlier block learns slower by the factor `layer_decay` (Howard & Ruder 2018)."""
    in_order = blocks(model)
    rates = [finetune.backbone_lr * finetune.layer_decay ** (len(in_order) - 1 - i) for i in range(len(in_order))]
    if finetune.layer_decay == 1:  # one group: an optimiser does one large step faster than many small ones
        in_order, rates = [[weights for block in in_order for weights in block]], rates[-1:]
    return [*zip(in_order, rates, strict=True), (_trained(of_head(model)), finetune.lr)]


def bias(model: Classifier, finetune: Finetune) -> Groups:
    """Biases, scales and shifts of norms, and the head (BitFit, Ben Zaken et al. 2022)."""
    model.requires_grad_(False)
    chosen = [
        weights
        for name, module in model.net.named_modules()
        if not of_a_head(name, model)
        for key, weights in module.named_parameters(recurse=False)
        if key.endswith("bias") or isinstance(module, NORMS)  # of attention: in_proj_bias
    ]
    return [(_trained(chosen), finetune.backbone_lr), (_trained(of_head(model)), finetune.lr)]


def lora(model: Classifier, finetune: Finetune) -> Groups:
    """Low-rank updates of convolutions, linear layers and attention's projections, and the head (Hu et al. 2022)."""
    model.requires_grad_(False)
    torch.manual_seed(finetune.seed)
    added: list[nn.Parameter] = []
    for name, module in list(model.net.named_modules()):
        key = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention) or of_a_head(name, model):
            continue
        weight = getattr(module, key)
        largest = min(len(weight), weight[0].numel())
        if finetune.lora.rank > largest:
            raise StageError(
                f"params.yaml: `finetune.lora.rank` is {finetune.lora.rank}, but the rank of the layer {name} of "
                f"{type(model.net).__name__} is {largest} at most; lower it to that"
            )
        update = LowRank(weight, finetune.lora.rank, finetune.lora.alpha)
        parametrize.register_parametrization(module, key, update)
        added += update.parameters()
    return [(added, finetune.backbone_lr), (_trained(of_head(model)), finetune.lr)]


STRATEGIES: dict[str, Callable[[Classifier, Finetune], Groups]] = {
    "head": head,
    "last_block": last_block,
    "full": full,
    "bias": bias,
    "lora": lora,
}


class LowRank(nn.Module):
    """Adds the low-rank product B A to a weight; at first it adds 0, because B is 0."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight[0].numel(), device=weight.device) / rank)
        self.b = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its update, of the same shape."""
        return weight + self.scale * (self.b @ self.a).view(weight.shape)


def merge(model: Classifier) -> None:
    """Adds low-rank updates to the weights for good; the weights have torchvision's names again."""
    for module in model.net.modules():
        for key in ("weight", "in_proj_weight"):
            if parametrize.is_parametrized(module, key):
                parametrize.remove_parametrizations(module, key, leave_parametrized=True)


def _trained(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    for each in parameters:
        each.requires_grad_(True)
    return parameters
