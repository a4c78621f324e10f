"""What self-supervised methods share: the projector, and the embeddings of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from stages.params.pretrain import SelfSupervised


def projector(width: int, settings: SelfSupervised) -> nn.Sequential:
    """Three layers from features (n, width) to embeddings (n, outputs)."""
    hidden = settings.width
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, settings.outputs),
    )


def views(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Both views (N, d) of the images of all processes, in float32.

    Each process has the whole loss and its gradient to its own embeddings: gradients are to be summed over processes.

    Args:
        embeddings: (2n, d), those of the first view before those of the second, in the same order.
    """
    first, second = embeddings.float().chunk(2)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return first, second
    return _gathered_rows(first), _gathered_rows(second)


def _gathered_rows(rows: Tensor) -> Tensor:
    """The rows of all processes; some processes may have one row fewer than others."""
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    largest = max(int(count) for count in counts)
    padded = F.pad(rows.detach(), (0, 0, 0, largest - len(rows)))
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    parts = [part[: int(count)] for part, count in zip(gathered, counts, strict=True)]
    parts[dist.get_rank()] = rows
    return torch.cat(parts)
