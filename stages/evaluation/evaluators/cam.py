"""Class activation maps: what in an image speaks for a class, as a heat map over the image.

Grad-CAM (Selvaraju et al. 2017) by captum, on the last block whose output is a map of at least 4 by 4. Networks that
end in tokens instead of maps (ViT): gradient x (pixel - mean) (Shrikumar et al. 2016).
"""

import copy
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerGradCam, Saliency
from matplotlib import colormaps
from torch import Tensor, nn
from torch.nn import functional as F

from stages.data.shards.loading.samples.evaluation_batches import evaluation_batches
from stages.data.shards.loading.samples.index import Samples
from stages.training.networks.layer_groups import members, of_a_head
from stages.training.networks.models import Classifier

Pixels = npt.NDArray[np.uint8]
LEAST_PLACES = 4
"""Smallest side of a map that is used. With small images the last block's map is 1 by 1 and shows nothing."""
STRENGTH = 0.55
"""Opacity of the colour over the image where the map is largest."""
AT_ONCE = 32


def heat_maps(
    model: Classifier,
    samples: Samples,
    targets: npt.NDArray[np.int64],
    *,
    image_size: int,
    resize: int,
    threads: int,
) -> Iterator[tuple[Pixels, Pixels]]:
    """For each image the crop that the model saw, and the crop with the heat map of a class over it.

    On the CPU in float32, wherever the model is: some poolings have no deterministic gradient on a GPU.

    Args:
        model: in evaluation mode.
        targets: (N,) the class to explain.

    Yields:
        two images (image_size, image_size, 3) uint8, in the order of `samples`.
    """
    if not len(samples):
        return
    model = copy.deepcopy(model).cpu()
    layer = last_map(model, torch.zeros(1, 3, image_size, image_size))
    batches = evaluation_batches(
        samples, image_size=image_size, resize=resize, batch_size=AT_ONCE, threads=threads, device="cpu"
    )
    start = 0
    for images, _ in batches:
        target = torch.from_numpy(targets[start : start + len(images)])
        start += len(images)
        heat = _attributed(model, layer, images, target)
        for pixels, each in zip(images.permute(0, 2, 3, 1).numpy(), heat.numpy(), strict=True):
            yield pixels, overlaid(pixels, each)


def last_map(model: Classifier, image: Tensor) -> nn.Module | None:
    """The last block whose output is a map of at least 4 by 4 places.

    None where what comes after it are tokens, (n, tokens, D), or has its channels last (Swin, on small images).
    """
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            seen.append((module, output))

    hooks = [
        module.register_forward_hook(note) for name, module in members("", model.net) if not of_a_head(name, model)
    ]
    try:
        with torch.inference_mode():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    for module, output in reversed(seen):
        if _is_map(output) and not isinstance(module, nn.AdaptiveAvgPool2d):
            return module
        if output.ndim == 3 or (output.ndim == 4 and output.shape[2] != output.shape[3]):
            return None
    return None


def _is_map(output: Tensor) -> bool:
    """Large enough, and square as the images are."""
    return output.ndim == 4 and LEAST_PLACES <= output.shape[2] == output.shape[3]


def _attributed(model: Classifier, layer: nn.Module | None, images: Tensor, target: Tensor) -> Tensor:
    """Heat (n, H, W) in 0..1; the maximum of each image is 1, or 0 if nothing speaks for the class."""
    inputs = images.float().requires_grad_()
    if layer is None:
        gradient = Saliency(model).attribute(inputs, target=target, abs=False)
        heat = (gradient * (inputs - model.mean)).sum(1, keepdim=True).relu()
        heat = F.avg_pool2d(heat, kernel_size=5, stride=1, padding=2)  # single pixels are noise to the eye
    else:
        heat = LayerGradCam(model, layer).attribute(inputs, target=target, relu_attributions=True)
        heat = F.interpolate(heat, size=images.shape[2:], mode="bilinear", align_corners=False)
    heat = heat.detach().float()[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def overlaid(pixels: Pixels, heat: npt.NDArray[np.float32]) -> Pixels:
    """The image (H, W, 3) uint8 in grey, coloured where the heat (H, W) in 0..1 is: matplotlib's inferno."""
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    colour = 255 * np.asarray(colormaps["inferno"](heat))[..., :3]
    weight = STRENGTH * heat[..., None]
    return np.clip((1 - weight) * grey + weight * colour, 0, 255).astype(np.uint8)
