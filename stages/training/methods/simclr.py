"""SimCLR (Chen et al. 2020): tell an image's other crop from those of all other images; it needs large batches."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.params.pretrain import SelfSupervised
from stages.training.methods.embeddings import views


def simclr(embeddings: Tensor, settings: SelfSupervised) -> Tensor:
    """NT-Xent: cross-entropy of finding each crop's partner among all crops but itself, ().

    Args:
        embeddings: (2n, d), those of the first view before those of the second, in the same order.
    """
    first, second = (F.normalize(view, dim=1) for view in views(embeddings))
    both = torch.cat([first, second])
    logits = both @ both.T / settings.temperature
    logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
    partners = torch.arange(len(both), device=both.device).roll(len(first))
    return F.cross_entropy(logits, partners)
