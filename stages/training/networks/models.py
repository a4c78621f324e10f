"""Models: torchvision classifiers by name, their normalisation, and their files (safetensors and a config)."""

import copy
import difflib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stages.runtime import layout
from stages.runtime.command import StageError
from stages.runtime.files import replaced_directory

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Prefixes of the weights of auxiliary heads, which are used in training only and never saved."""
AUXILIARY_WEIGHT = {"googlenet": 0.3, "inception_v3": 0.4}
"""Weight of each auxiliary head's loss (Szegedy et al. 2015; torchvision's own recipe for Inception v3)."""


class Classifier(nn.Module):
    """A torchvision classifier that takes images as they are loaded: it normalises them itself, on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float], auxiliary_weight: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.head_name = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
        """The layer with an output per class."""
        self.auxiliary_weight = auxiliary_weight
        """Factor of each auxiliary head's loss."""
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits (N, C) float32 of images (N, 3, H, W) in 0..255, uint8 or float.

        In training, a network with auxiliary heads gives a tuple: the logits, then those of each auxiliary head.
        """
        outputs = self.net((images.float() - self.mean) / self.std)
        if isinstance(outputs, tuple):
            return tuple(each.float() for each in outputs)
        return outputs.float()

    def features(self, images: Tensor) -> Tensor:
        """The inputs of the head, (N, D) float32, for images (N, 3, H, W) in 0..255."""
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the head, (N, D) float32, and the logits, in one pass; the model is in evaluation mode."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self(images)
        finally:
            hook.remove()
        return seen[0].flatten(1).float(), logits

    @property
    def head(self) -> Any:
        """The layer with an output per class; in self-supervision the projector."""
        return self.net.get_submodule(self.head_name)


def build(config: dict[str, Any], seed: int, auxiliary_heads: bool = False) -> Classifier:
    """A classifier with random weights drawn from `seed`.

    Args:
        config: as in config.json; uses `architecture`, `classes`, `image_size`, `mean`, `std` and, if there, `stem`.
        auxiliary_heads: those of googlenet and inception_v3, used in training only.

    Raises:
        StageError: torchvision has no classifier of this name, it has no linear head, or `stem` is not for it.
    """
    architecture = config["architecture"]
    check_known(architecture)
    torch.manual_seed(seed)
    options = _options(architecture, config["image_size"], auxiliary_heads)
    try:
        net = torchvision.models.get_model(
            architecture, weights=None, num_classes=max(len(config["classes"]), 1), **options
        )
    except (AssertionError, ValueError) as error:
        raise _takes_no(architecture, config["image_size"], error) from error
    if not any(isinstance(module, nn.Linear) for module in net.modules()):
        raise StageError(f"params.yaml: `model.architecture`: {architecture} has no linear head to replace")
    if config.get("stem", "standard") != "standard":
        change_stem(net, config["stem"], architecture)
    return Classifier(net, config["mean"], config["std"], AUXILIARY_WEIGHT.get(architecture, 0.0))


def check_known(architecture: str) -> None:
    """Raises StageError where torchvision has no classifier of this name."""
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        near = ", ".join(difflib.get_close_matches(architecture, known, 3)) or "see torchvision.models.list_models()"
        raise StageError(f"params.yaml: `model.architecture`: torchvision has no {architecture!r}; near: {near}")


def _options(architecture: str, image_size: int, auxiliary_heads: bool) -> dict[str, Any]:
    if architecture in AUXILIARY_WEIGHT:
        return {"aux_logits": auxiliary_heads, "init_weights": True}
    if architecture.startswith("vit_"):  # its position embeddings fit one size only
        return {"image_size": image_size}
    return {"input_size": (image_size, image_size)} if architecture == "maxvit_t" else {}


def _takes_no(architecture: str, image_size: int, error: Exception, key: str = "`model.image_size`") -> StageError:
    return StageError(f"params.yaml: {key}: {architecture} takes no image of {image_size} px: {error}")


def change_stem(net: nn.Module, stem: str, architecture: str) -> None:
    """Replaces the layers before a network's first block by others that lose less of the resolution.

    A 7x7 convolution with stride 2 and a max-pool become a 3x3 convolution with stride 2 (`half`) or 1 (`small`, usual
    for CIFAR since He et al. 2016); a 3x3 convolution with stride 2 keeps it (`half`) or gets 1 (`small`); patches of
    4x4 pixels become patches of 2x2 (`half`).

    Raises:
        StageError: the network has no such stem.
    """
    name, first = next((name, each) for name, each in net.named_modules() if isinstance(each, nn.Conv2d))
    kernel, stride = first.kernel_size[0], first.stride[0]
    own_stride = 2 if stem == "half" else 1
    if (kernel, stride) in ((7, 2), (3, 2)) and architecture not in ("inception_v3", "squeezenet1_0", "squeezenet1_1"):
        replacement = _convolution(first, 3, own_stride)
        nn.init.kaiming_normal_(replacement.weight, mode="fan_out", nonlinearity="relu")
        pools = [name for name, each in net.named_modules() if isinstance(each, nn.MaxPool2d)]
        if kernel == 7 or pools[:1] == ["maxpool"]:
            net.set_submodule(pools[0], nn.Identity())
    elif (kernel, stride, stem) == (4, 4, "half"):
        replacement = _convolution(first, 2, 2)
        nn.init.trunc_normal_(replacement.weight, std=0.02)
    else:
        raise StageError(f"params.yaml: `model.stem`: {architecture} has no stem that could be {stem}; use standard")
    net.set_submodule(name, replacement)


def _convolution(like: nn.Conv2d, kernel: int, stride: int) -> nn.Conv2d:
    padding = kernel // 2 if kernel % 2 else 0
    return nn.Conv2d(like.in_channels, like.out_channels, kernel, stride, padding, bias=like.bias is not None)


def replace_head(model: Classifier, module: nn.Module) -> None:
    """Replaces the head by `module`, such as a projector."""
    model.net.set_submodule(model.head_name, module)


def fresh_head(model: Classifier, width: int, classes: int, bias: bool, seed: int) -> None:
    """Replaces the head by a linear layer with random weights, for features of `width` dimensions."""
    torch.manual_seed(seed)
    replace_head(model, nn.Linear(width, classes, bias))


def check_takes(model: Classifier, image_size: int, key: str = "`model.image_size`") -> None:
    """Shows the model an empty image, so that a size it cannot take is reported before training.

    Args:
        key: the key of params.yaml that asks for this size, for the message.

    Raises:
        StageError: the model cannot take this size.
    """
    name = type(model.net).__name__
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _takes_no(name, image_size, error, key) from error
    if not any(key.startswith(AUXILIARY) for key in model.net.state_dict()):
        return
    try:
        with torch.no_grad():  # on a copy: running statistics move; two images: norms need more than one value
            copy.deepcopy(model).train()(torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8))
    except (RuntimeError, ValueError) as error:
        raise StageError(
            f"params.yaml: `model.auxiliary_heads`: those of {name} take no image of {image_size} px ({error}); set it "
            "to false, or `model.image_size` to 224 (GoogLeNet) or 299 (Inception v3)"
        ) from error


def take_weights(net: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """As `load_state_dict`, without the versions of layers: MNASNet insists on them, but safetensors lack them."""
    versioned = OrderedDict(weights)
    versioned._metadata = net.state_dict()._metadata  # type: ignore[attr-defined]
    net.load_state_dict(versioned, strict=strict)


def copy_backbone(source: Classifier, target: Classifier) -> None:
    """Gives `target` all weights of `source` but those of the head, whose classes differ."""
    left_out = (f"{source.head_name}.", *AUXILIARY)
    weights = {name: value for name, value in source.net.state_dict().items() if not name.startswith(left_out)}
    own = target.net.state_dict()
    wanted = {name for name in own if not name.startswith(left_out)}
    if set(weights) != wanted or any(weights[name].shape != own[name].shape for name in wanted):
        raise StageError(
            "the backbone is of another architecture, stem or size than the model; `dvc repro pretrain` makes it anew"
        )
    take_weights(target.net, weights, strict=False)


def save_classifier(model: Classifier, config: dict[str, Any], folder: Path) -> None:
    """Writes `model.safetensors` (torchvision's own names) and `config.json`; the same weights give the same bytes."""
    with replaced_directory(folder) as aside:
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in model.net.state_dict().items()
            if not name.startswith(AUXILIARY)
        }
        (aside / layout.WEIGHTS).write_bytes(save(weights))
        (aside / layout.CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_classifier(folder: Path, device: str = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """A model that `save_classifier` wrote, in evaluation mode, and its config.

    Raises:
        StageError: the folder holds no model.
    """
    try:
        config = json.loads((folder / layout.CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / layout.WEIGHTS)
    except FileNotFoundError as error:
        raise StageError(f"{folder} holds no model ({error.filename} is missing); `dvc repro` makes it") from None
    model = build(config, seed=0)
    take_weights(model.net, weights)
    return model.to(device).eval(), config
