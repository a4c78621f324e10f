"""Strategies of fine-tuning: which weights are trained, and how fast. One function a strategy, alike in shape."""

from collections.abc import Callable

from torch import nn

from stages.params.finetune import Finetune
from stages.training.models import Classifier

Groups = list[tuple[list[nn.Parameter], float]]
"""Parameters to train with their peak learning rate."""


def head(model: Classifier, finetune: Finetune) -> Groups:
    """The new head alone; the backbone stays as it came."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return [(list(model.head.parameters()), finetune.lr)]


def full(model: Classifier, finetune: Finetune) -> Groups:
    """Every weight, the pretrained ones at a rate of their own."""
    of_head = {id(parameter) for parameter in model.head.parameters()}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in of_head]
    return [(backbone, finetune.backbone_lr), (list(model.head.parameters()), finetune.lr)]


def scratch(model: Classifier, finetune: Finetune) -> Groups:
    """Every weight at the head's rate: nothing is pretrained."""
    return [(list(model.parameters()), finetune.lr)]


STRATEGIES: dict[str, Callable[[Classifier, Finetune], Groups]] = {"head": head, "full": full}
