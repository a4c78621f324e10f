"""k-nearest-neighbour classification: how good features are, without training a head (Wu et al. 2018)."""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
QUERIES_AT_ONCE = 1024
"""Similarities to the whole bank are computed for this many queries at a time."""


def knn_correct(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, classes: int) -> int:
    """How many queries the weighted vote of their k nearest neighbours classifies correctly.

    Args:
        bank: (N, d) float32 features; `bank_labels`: (N,).
        queries: (M, d) float32 features; `query_labels`: (M,).
    """
    bank = F.normalize(bank, dim=1)
    correct = 0
    for part, truth in zip(queries.split(QUERIES_AT_ONCE), query_labels.split(QUERIES_AT_ONCE), strict=True):
        similarity, neighbours = (F.normalize(part, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, dtype=torch.float64)
        votes.scatter_add_(1, bank_labels[neighbours], (similarity.double() / TEMPERATURE).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct
