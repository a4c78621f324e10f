"""Self-supervision: both losses against plain formulas and over two processes, and k-NN against scikit-learn."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stages.params.pretrain import SelfSupervised
from stages.training.methods.embeddings import projector
from stages.training.methods.knn import knn_correct
from stages.training.methods.self_supervision import METHODS
from stages.training.methods.simclr import simclr
from stages.training.methods.vicreg import vicreg
from tests.workspace import ROOT

SETTINGS = SelfSupervised(width=16, outputs=8)


def embeddings(count: int, seed: int = 1) -> torch.Tensor:
    """Two views of so many images, (2n, 8)."""
    return torch.randn(2 * count, 8, generator=torch.Generator().manual_seed(seed))


def test_simclr_is_nt_xent_written_out() -> None:
    found = embeddings(5)
    unit = found / found.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(10):
        other = (i + 5) % 10
        similar = [math.exp(float(unit[i] @ unit[j]) / SETTINGS.temperature) for j in range(10)]
        total -= math.log(similar[other] / (sum(similar) - similar[i]))
    assert simclr(found, SETTINGS).item() == pytest.approx(total / 10, rel=1e-5)


def test_vicreg_is_its_three_terms_written_out() -> None:
    found = embeddings(6).double()
    first, second = found[:6].numpy(), found[6:].numpy()
    invariance = ((first - second) ** 2).mean()
    variance = np.mean([np.maximum(0, 1 - np.sqrt(view.var(axis=0, ddof=1) + 1e-4)).mean() for view in (first, second)])
    covariance = 0.0
    for view in (first, second):
        square = np.cov(view.T)
        covariance += ((square - np.diag(np.diag(square))) ** 2).sum() / 8
    assert vicreg(found, SETTINGS).item() == pytest.approx(25 * invariance + 25 * variance + covariance, rel=1e-5)


def test_views_that_agree_cost_less_than_those_of_other_images_and_collapse_costs_most() -> None:
    one = embeddings(64)[:64] * 1.3
    agree, mixed, collapsed = torch.cat([one, one]), torch.cat([one, one.roll(1, 0)]), torch.ones(128, 8)
    for method in METHODS.values():
        assert method(agree, SETTINGS) < method(mixed, SETTINGS)
        assert method(agree, SETTINGS) < method(collapsed, SETTINGS)


def network() -> nn.Module:
    """Without norms, which would see other batches in two processes than in one."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))


def images(count: int) -> torch.Tensor:
    """Two views of so many images, (2, n, 6)."""
    return torch.randn(2, count, 6, generator=torch.Generator().manual_seed(2))


def gradients_in_a_process(rank: int, folder: str, count: int) -> None:
    """What one of two processes does; the first writes its gradients down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    part = np.array_split(np.arange(count), 2)[rank]
    found = {}
    for name, method in METHODS.items():
        model = DistributedDataParallel(network())
        loss = method(model(images(count)[:, part].flatten(0, 1)), SETTINGS)
        (2 * loss).backward()  # DDP takes the mean over both processes where the sum is meant
        found[name] = [weights.grad for weights in model.module.parameters()]
    if not rank:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    count = 7  # four and three
    # Not by multiprocessing, which leaves a process of its own behind until the tests are over.
    module = "tests.training.methods.test_self_supervision"
    code = f"import {module} as t; t.gradients_in_a_process({{}}, {str(tmp_path)!r}, {count})"
    both = [subprocess.Popen([sys.executable, "-c", code.format(rank)], cwd=ROOT) for rank in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    found = torch.load(tmp_path / "gradients.pt")
    for name, method in METHODS.items():
        model = network()
        method(model(images(count).flatten(0, 1)), SETTINGS).backward()
        for weights, other in zip(model.parameters(), found[name], strict=True):
            assert weights.grad is not None
            assert torch.allclose(weights.grad, other, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("k", [1, 5, 500])
def test_k_nn_counts_as_scikit_learn_does(k: int) -> None:
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(300, 8)), rng.normal(size=(100, 8))
    of_bank, of_queries = rng.integers(0, 4, 300), rng.integers(0, 4, 100)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, queries)]
    theirs = KNeighborsClassifier(min(k, 300), weights=lambda far: np.exp((1 - far**2 / 2) / 0.07))
    expected = int((theirs.fit(unit[0], of_bank).predict(unit[1]) == of_queries).sum())
    one, of_one, other, of_other = (torch.from_numpy(each) for each in (bank, of_bank, queries, of_queries))
    assert knn_correct(one, of_one, other, of_other, k, 4) == expected


def test_the_projector_gives_embeddings_of_the_wanted_size() -> None:
    assert projector(32, SETTINGS)(torch.randn(4, 32)).shape == (4, 8)
