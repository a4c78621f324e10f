"""Parameters grouped by depth, for layer-wise learning rates and partial freezing."""

from collections.abc import Iterator

from torch import nn
from torchvision.models.vision_transformer import Encoder

from stages.training.networks.models import AUXILIARY, Classifier

Groups = list[tuple[list[nn.Parameter], float]]
"""Parameters to train with their peak learning rate; the last group is the head's."""
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def every_weight(model: Classifier, lr: float) -> Groups:
    """All parameters at one rate, the head's in a group of their own: for training from random weights."""
    return [([weights for block in blocks(model) for weights in block], lr), (of_head(model), lr)]


def of_head(model: Classifier) -> list[nn.Parameter]:
    """The parameters of the head and of auxiliary heads."""
    auxiliary = [weights for name, weights in model.net.named_parameters() if name.startswith(AUXILIARY)]
    return [*auxiliary, *model.head.parameters()]


def trainable(model: Classifier) -> tuple[int, float]:
    """How many parameters are trained (single numbers), and their share of all."""
    count = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    return count, count / sum(weights.numel() for weights in model.parameters())


def blocks(model: Classifier) -> list[list[nn.Parameter]]:
    """All parameters but the heads', by block in forward order.

    A block is one member of the network's own sequences: a residual block, an encoder layer, an inception; where a
    member is a single layer, a convolution or linear layer with the norm after it. A class token and other parameters
    outside of these belong to the first block.
    """
    grouped: list[list[nn.Parameter]] = []
    for name, module in members("", model.net):
        if of_a_head(name, model):
            continue
        parameters = list(module.parameters())
        if parameters and isinstance(module, NORMS) and grouped:
            grouped[-1] += parameters
        elif parameters:
            grouped.append(parameters)
    seen = {id(weights) for block in [*grouped, list(model.head.parameters())] for weights in block}
    outside = [
        weights
        for name, weights in model.net.named_parameters()
        if id(weights) not in seen and not name.startswith(AUXILIARY)
    ]
    return [outside + grouped[0], *grouped[1:]]


def members(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of a network's outermost sequences, and its modules outside of them, by name, in forward order."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if type(child) in (nn.Sequential, nn.ModuleList, Encoder):
            yield from members(path, child)
        else:
            yield path, child


def of_a_head(name: str, model: Classifier) -> bool:
    """Whether a module of this name is the head, an auxiliary head, or part of one."""
    return f"{name}.".startswith((f"{model.head_name}.", *AUXILIARY))
