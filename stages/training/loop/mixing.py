"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019), by torchvision."""

import torch
from torch import Tensor
from torchvision.transforms import v2


class Mixer:
    """Mixes each image of a batch with the one before it; with both methods on, one of the two at random a batch."""

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        """The alphas of both Beta distributions; 0: off."""
        self.methods: list[v2.Transform] = []
        if mixup:
            self.methods.append(v2.MixUp(alpha=mixup, num_classes=classes))
        if cutmix:
            self.methods.append(v2.CutMix(alpha=cutmix, num_classes=classes))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, H, W) in 0..255 as float32, and targets (n, classes); both unchanged where neither is on.

        Draws from torch's global generator on the CPU.
        """
        if not self.methods or len(labels) < 2:
            return images, labels
        method = self.methods[int(torch.randint(len(self.methods), ()))]
        mixed, targets = method(images.float(), labels)
        return mixed, targets
