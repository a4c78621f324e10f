"""VICReg (Bardes, Ponce & LeCun 2022): self-supervision without negative examples.

Crops of an image shall agree (invariance), while no output may become constant (variance) or repeat another
(covariance). It was chosen over BYOL and DINO because it has no second network, no momentum and no stopped gradients,
works with small batches, and its collapse would show in its own terms.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.params.pretrain import SelfSupervised
from stages.training.methods.embeddings import views


def vicreg(embeddings: Tensor, settings: SelfSupervised) -> Tensor:
    """The weighted sum of invariance, variance and covariance, ().

    Args:
        embeddings: (2n, d), those of the first view before those of the second, in the same order.
    """
    both = views(embeddings)
    invariance = F.mse_loss(*both)
    variance = sum(F.relu(1 - (view.var(dim=0) + 1e-4).sqrt()).mean() for view in both) / 2
    covariance = sum(_off_diagonal(view.T.cov()).square().sum() / view.shape[1] for view in both)
    return settings.invariance * invariance + settings.variance * variance + settings.covariance * covariance


def _off_diagonal(square: Tensor) -> Tensor:
    return square - torch.diag(torch.diagonal(square))
