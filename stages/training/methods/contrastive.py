"""Self-supervision: what two crops of an image are to have in common. The backbone is kept, the projector is not.

`simclr` (Chen et al. 2020) tells an image's other crop from those of all other images, so it needs large batches.
`vicreg` (Bardes, Ponce & LeCun 2022) needs no others: crops of an image shall agree (invariance), while no output may
become constant (variance) or repeat another (covariance). It was chosen over BYOL and DINO because it has no second
network, no momentum and no stopped gradients, works with small batches, and its collapse would show in its own terms.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from stages.params.pretrain import SelfSupervised

NEIGHBOUR_TEMPERATURE = 0.07
QUERIES_AT_ONCE = 1024
"""So many queries' similarities to the whole bank are held at once."""


def projector(width: int, settings: SelfSupervised) -> nn.Sequential:
    """Three layers from features (n, width) to embeddings (n, outputs)."""
    hidden = settings.width
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, settings.outputs),
    )  # fmt: skip


def simclr(embeddings: Tensor, settings: SelfSupervised) -> Tensor:
    """NT-Xent: cross-entropy of each crop's other one among all crops but itself, ().

    Args:
        embeddings: (2n, d), those of the first view before those of the second, in the same order.
    """
    first, second = (F.normalize(each, dim=1) for each in _of_all(embeddings))
    every = torch.cat([first, second])
    logits = every @ every.T / settings.temperature
    logits = logits.masked_fill(torch.eye(len(every), dtype=torch.bool, device=every.device), -torch.inf)
    others = torch.arange(len(every), device=every.device).roll(len(first))
    return F.cross_entropy(logits, others)


def vicreg(embeddings: Tensor, settings: SelfSupervised) -> Tensor:
    """The weighted sum of invariance, variance and covariance, ().

    Args:
        embeddings: as for `simclr`.
    """
    views = _of_all(embeddings)
    invariance = F.mse_loss(*views)
    variance = sum(F.relu(1 - (view.var(dim=0) + 1e-4).sqrt()).mean() for view in views) / 2
    covariance = sum(_off_diagonal(view.T.cov()).square().sum() / view.shape[1] for view in views)
    return settings.invariance * invariance + settings.variance * variance + settings.covariance * covariance


METHODS: dict[str, Callable[[Tensor, SelfSupervised], Tensor]] = {"simclr": simclr, "vicreg": vicreg}


def _off_diagonal(square: Tensor) -> Tensor:
    return square - torch.diag(torch.diagonal(square))


def _of_all(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Both views (N, d) of the images of all processes, in float32.

    Each process has the whole loss and its gradient to its own embeddings: gradients are to be summed over processes.
    """
    first, second = embeddings.float().chunk(2)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return first, second
    return _gathered(first), _gathered(second)


def _gathered(mine: Tensor) -> Tensor:
    """Rows of all processes, of which some may have one fewer than others."""
    counts = [torch.zeros((), dtype=torch.int64, device=mine.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(mine), device=mine.device))
    most = max(int(count) for count in counts)
    padded = F.pad(mine.detach(), (0, 0, 0, most - len(mine)))
    every = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(every, padded)
    rows = [each[: int(count)] for each, count in zip(every, counts, strict=True)]
    rows[dist.get_rank()] = mine
    return torch.cat(rows)


def knn_hits(bank: Tensor, of_bank: Tensor, queries: Tensor, of_queries: Tensor, k: int, classes: int) -> int:
    """How many queries the weighted vote of their k nearest neighbours puts into the right class (Wu et al. 2018).

    Args:
        bank: (N, d) float32 features; `of_bank`: their labels (N,).
        queries: (M, d) float32 features; `of_queries`: their labels (M,).
    """
    bank = F.normalize(bank, dim=1)
    hits = 0
    for some, truth in zip(queries.split(QUERIES_AT_ONCE), of_queries.split(QUERIES_AT_ONCE), strict=True):
        similar, which = (F.normalize(some, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(some), classes, dtype=torch.float64)
        votes.scatter_add_(1, of_bank[which], (similar.double() / NEIGHBOUR_TEMPERATURE).exp())
        hits += int((votes.argmax(1) == truth).sum())
    return hits
