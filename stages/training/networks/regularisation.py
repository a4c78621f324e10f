"""Dropout (Srivastava et al. 2014) and stochastic depth (Huang et al. 2016) for an existing network.

Set by hooks and by the layers' own settings: weights keep their names, so the saved model loads without either.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mnasnet, mobilenetv2, mobilenetv3
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth, stochastic_depth

from stages.runtime.command import StageError
from stages.training.networks.models import Classifier


def regularise(model: Classifier, dropout: float | None, depth: float | None) -> None:
    """Sets the probability of dropout, and that of skipping the last residual branch; None changes nothing.

    Raises:
        StageError: `depth` for an architecture without residual branches that could be skipped.
    """
    if dropout is not None:
        _drop(model, dropout)
    if depth is not None:
        _skip(model, depth)


def _drop(model: Classifier, probability: float) -> None:
    layers = [module for module in model.net.modules() if isinstance(module, nn.Dropout)]
    for layer in layers:
        layer.p = probability
    if not layers:
        model.head.register_forward_pre_hook(partial(_dropped, probability))


def _dropped(probability: float, head: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return F.dropout(inputs[0], probability, head.training)


def _skip(model: Classifier, probability: float) -> None:
    """The probability rises in even steps from the first branch to `probability` at the last."""
    branches = _branches(model.net)
    if not branches:
        raise StageError(
            f"params.yaml: `stochastic_depth`: {type(model.net).__name__} has no residual branches that could be "
            "skipped; leave it out"
        )
    for number, branch in enumerate(branches, start=1):
        rising = probability * number / len(branches)
        if isinstance(branch, StochasticDepth):
            branch.p = rising
        else:
            branch.register_forward_hook(partial(_skipped, rising, model))


def _branches(net: nn.Module) -> list[nn.Module]:
    """Modules whose output is added to the block's input, in forward order."""
    branches: list[Any] = []
    for module in net.modules():
        if isinstance(module, StochasticDepth):
            branches.append(module)
        elif isinstance(module, Bottleneck):
            branches.append(module.bn3)
        elif isinstance(module, BasicBlock):
            branches.append(module.bn2)
        elif isinstance(module, EncoderBlock):
            branches += [module.dropout, module.mlp]
        elif isinstance(module, ResBottleneckBlock):
            branches.append(module.f)
        elif isinstance(module, mobilenetv2.InvertedResidual) and module.use_res_connect:
            branches.append(module.conv)
        elif isinstance(module, mobilenetv3.InvertedResidual) and module.use_res_connect:
            branches.append(module.block)
        elif isinstance(module, mnasnet._InvertedResidual) and module.apply_residual:
            branches.append(module.layers)
    return branches


def _skipped(probability: float, model: nn.Module, _branch: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    # The network's mode, not the branch's: a frozen norm is never in training mode.
    return stochastic_depth(output, probability, "row", model.training)


def training_mode(model: nn.Module) -> None:
    """Training mode, except for modules with frozen weights: such a norm also keeps its running statistics."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.training = False  # not recursive: dropout inside it stays on
