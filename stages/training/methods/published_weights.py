"""Weights to start from: torchvision's published ones, or a safetensors file with torchvision's names."""

import logging
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from stages.runtime.command import StageError
from stages.training.networks.models import AUXILIARY, Classifier, check_known, take_weights

logger = logging.getLogger(__name__)
KEY = "params.yaml: `pretrain.weights`"
TRANSFORMING = ("googlenet", "inception_v3")
"""Their published weights expect images in -1..1; torchvision's own networks convert images to that."""


def start_from(model: Classifier, architecture: str, weights: str) -> None:
    """Gives `model` the weights that `weights` names, the head's only where the number of classes is the same.

    Args:
        weights: `torchvision`, `torchvision:NAME`, or the path of a safetensors file.

    Raises:
        StageError: they cannot be read or downloaded, or belong to another network.
    """
    source, _, name = weights.partition(":")
    loaded = _published(architecture, name) if source == "torchvision" else _of_file(Path(weights))
    loaded = {key: value for key, value in loaded.items() if not key.startswith(AUXILIARY)}
    if isinstance(model.net, VisionTransformer):
        loaded = _for_size(model.net, loaded)
    own = model.net.state_dict()
    head = f"{model.head_name}."
    of_head = {key for key in own if key.startswith(head)}
    if any(key not in loaded or loaded[key].shape != own[key].shape for key in of_head):
        logger.info("the head is for other classes than that of %s and starts at random", weights)
        loaded = {key: value for key, value in loaded.items() if not key.startswith(head)}
    _check(loaded, own, of_head, weights)
    take_weights(model.net, loaded, strict=False)


def _for_size(net: VisionTransformer, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Interpolates position embeddings to the network's image size."""
    try:
        return dict(interpolate_embeddings(net.image_size, net.patch_size, loaded))
    except (KeyError, ValueError):  # no positions, or not a square of them: `_check` reports what does not fit
        return loaded


def normalisation(architecture: str, weights: str) -> dict[str, list[float]] | None:
    """The normalisation that torchvision's weights expect, `mean` and `std` in 0..1; None for a file: it has none."""
    source, _, name = weights.partition(":")
    if source != "torchvision":
        return None
    if architecture in TRANSFORMING:
        return {"mean": [0.5] * 3, "std": [0.5] * 3}
    expected = _chosen(architecture, name).transforms()
    return {"mean": [*expected.mean], "std": [*expected.std]}


def _chosen(architecture: str, name: str) -> WeightsEnum:
    check_known(architecture)
    known = torchvision.models.get_model_weights(architecture)
    if name and name not in known.__members__:
        raise StageError(
            f"{KEY}: torchvision has no {name} of {architecture}; there are: {', '.join(known.__members__)}"
        )
    return known[name] if name else known.DEFAULT


def _published(architecture: str, name: str) -> dict[str, Tensor]:
    chosen = _chosen(architecture, name)
    try:
        # Loaded by the model itself: it converts old files with other names or without counts of batches.
        return torchvision.models.get_model(architecture, weights=chosen).state_dict()
    except (URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise StageError(
            f"{KEY}: {chosen.url} cannot be had ({error}); where there is a network, download it and put it into "
            f"{folder}, or name a safetensors file here"
        ) from error
    except RuntimeError as error:  # a damaged download
        raise StageError(f"{KEY}: {chosen.url}: {str(error).splitlines()[0]}; run again") from error


def _of_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise StageError(f"{KEY}: there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise StageError(f"{KEY}: {path} is not a safetensors file ({error})") from error


def _check(loaded: dict[str, Tensor], own: dict[str, Tensor], of_head: set[str], weights: str) -> None:
    wanted = {key for key in own if not key.startswith(AUXILIARY)}
    wrong = [f"{key} is missing" for key in sorted(wanted - set(loaded) - of_head)]
    wrong += [f"{key} is not of this network" for key in sorted(set(loaded) - wanted)]
    wrong += [
        f"{key} is {tuple(loaded[key].shape)}, not {tuple(own[key].shape)}"
        for key in sorted(set(loaded) & wanted)
        if loaded[key].shape != own[key].shape
    ]
    wrong += [f"{key} holds what is not a number" for key in sorted(loaded) if not torch.isfinite(loaded[key]).all()]
    if wrong:
        raise StageError(
            f"{KEY}: {weights} does not fit `model.architecture`, `model.stem` and `model.image_size`: "
            f"{'; '.join(wrong[:3])}{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
        )
