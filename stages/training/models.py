"""Models: torchvision classifiers by name, their normalisation, and their files (safetensors and a config)."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stages.command import StageError
from stages.files import replaced_directory


class Classifier(nn.Module):
    """A torchvision classifier that takes images as they are loaded: normalisation is part of it, on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) float32 of images (N, 3, H, W) uint8."""
        return self.net((images.float() - self.mean) / self.std).float()

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (N, D) float32, of images (N, 3, H, W) uint8."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self(images)
        finally:
            hook.remove()
        return seen[0].flatten(1).float()

    @property
    def head_name(self) -> str:
        """Name of the last linear layer, whose outputs are the classes."""
        return [name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)][-1]

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        head = self.net.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head


def build(config: dict[str, Any], seed: int) -> Classifier:
    """A classifier with random weights drawn from `seed`.

    Args:
        config: as in config.json; `architecture`, `classes`, `mean` and `std` are read.

    Raises:
        StageError: torchvision has no classifier of this name, or it has no linear head.
    """
    architecture = config["architecture"]
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        near = ", ".join(difflib.get_close_matches(architecture, known, 3)) or "see torchvision.models.list_models()"
        raise StageError(f"params.yaml: `model.architecture`: torchvision has no {architecture!r}; near: {near}")
    # Auxiliary heads would change what the model returns while it trains.
    extra = {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
    torch.manual_seed(seed)
    net = torchvision.models.get_model(architecture, weights=None, num_classes=max(len(config["classes"]), 1), **extra)
    if not any(isinstance(module, nn.Linear) for module in net.modules()):
        raise StageError(f"params.yaml: `model.architecture`: {architecture} has no linear head to replace")
    return Classifier(net, config["mean"], config["std"])


def check_takes(model: Classifier, image_size: int) -> None:
    """Shows the model one empty image, so that a size which the architecture cannot take is known before training.

    Raises:
        StageError: it cannot take it.
    """
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise StageError(
            f"params.yaml: `model.image_size`: {type(model.net).__name__} takes no image of {image_size} px: {error}"
        ) from error


def copy_backbone(source: Classifier, target: Classifier) -> None:
    """Gives `target` all weights of `source` but the head's, which is for other classes."""
    head = f"{source.head_name}."
    weights = {name: value for name, value in source.net.state_dict().items() if not name.startswith(head)}
    missing, unexpected = target.net.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith(head) for name in missing):
        raise StageError("the backbone is of another architecture than the model; `dvc repro pretrain` makes it anew")


def save_classifier(model: Classifier, config: dict[str, Any], folder: Path) -> None:
    """Writes `model.safetensors` (torchvision's own names) and `config.json`; the same weights give the same bytes."""
    with replaced_directory(folder) as aside:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.net.state_dict().items()}
        (aside / "model.safetensors").write_bytes(save(weights))
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_classifier(folder: Path, device: str = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """A model that `save_classifier` wrote, in evaluation mode, and its config.

    Raises:
        StageError: the folder holds no model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise StageError(f"{folder} holds no model ({error.filename} is missing); `dvc repro` makes it") from None
    model = build(config, seed=0)
    model.net.load_state_dict(weights)
    return model.to(device).eval(), config
