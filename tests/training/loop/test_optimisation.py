"""Optimisers, schedules and the average of weights: the formulas, what is decayed, and exact resume."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from stages.params.training.recipe import Recipe
from stages.training.loop.optimisation import Ema, optimiser, orthogonalised, schedule
from stages.training.networks.layer_groups import every_weight
from stages.training.networks.models import build
from tests.training.images import CONFIG

OPTIMISERS = ("sgd", "adamw", "muon")


def recipe(**values: Any) -> Recipe:
    """With 10 epochs of 10 steps, unless said otherwise."""
    return Recipe(**({"epochs": 10, "lr": 2.0} | values))


def rates(chosen: Recipe, steps: int = 100) -> list[float]:
    """The learning rate of every step."""
    sgd = optimiser([([nn.Parameter(torch.zeros(1))], chosen.lr)], chosen)
    falling = schedule(sgd, chosen, 10)
    found = []
    for _ in range(steps):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        falling.step()
    return found


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_the_rate_rises_to_the_peak_and_falls_to_nothing(name: str) -> None:
    found = rates(recipe(schedule=name, warmup=0.25))
    assert max(found) == pytest.approx(2.0, rel=1e-3)
    peak = found.index(max(found))
    assert peak in (24, 25)
    assert found == sorted(found[:peak]) + sorted(found[peak:], reverse=True)
    assert found[-1] < 0.01


def test_steps_divide_by_ten_after_each_milestone() -> None:
    found = rates(recipe(schedule="steps", milestones=[4, 8], warmup=0.1))
    assert found[10:40] == [2.0] * 30
    assert found[40:80] == pytest.approx([0.2] * 40)
    assert found[80:] == pytest.approx([0.02] * 20)
    assert found[:10] == sorted(found[:10]) and found[0] < 0.3


def test_a_schedule_without_warm_up_begins_at_the_peak() -> None:
    assert rates(recipe(warmup=0.0))[0] == 2.0
    assert max(rates(recipe(schedule="one_cycle", warmup=0.0))[:2]) == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_one_cycle_moves_momentum_against_the_rate(name: str) -> None:
    chosen = optimiser(every_weight(build(CONFIG, seed=1), 1.0), moving := recipe(
        optimiser=name, schedule="one_cycle", momentum=0.9
    ))  # fmt: skip
    falling = schedule(chosen, moving, 10)
    found = []
    for _ in range(100):
        (group, *_) = chosen.param_groups
        found.append((group["lr"], group["betas"][0] if name == "adamw" else group["momentum"]))
        chosen.step()
        falling.step()
    momenta = [momentum for _, momentum in found]
    assert (min(momenta), max(momenta)) == (pytest.approx(0.8, abs=1e-3), pytest.approx(0.9, abs=1e-3))
    assert max(found)[1] == min(momenta)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_weight_is_trained_once_and_no_norm_is_decayed(name: str) -> None:
    model = build(CONFIG, seed=1)
    model.net.get_submodule("conv1").requires_grad_(False)
    chosen = optimiser(every_weight(model, 0.1), recipe(optimiser=name, weight_decay=0.1))
    seen = [parameter for group in chosen.param_groups for parameter in group["params"]]
    assert sorted(map(id, seen)) == sorted(id(each) for each in model.parameters() if each.requires_grad)
    for group in chosen.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])


@pytest.mark.parametrize("name", OPTIMISERS)
def test_biases_that_look_like_a_matrix_are_biases(name: str) -> None:
    model = build(CONFIG | {"architecture": "swin_t"}, seed=1)
    tables = {id(each) for key, each in model.named_parameters() if key.endswith("relative_position_bias_table")}
    chosen = optimiser(every_weight(model, 0.1), recipe(optimiser=name, weight_decay=0.1), model=model)
    found = [group for group in chosen.param_groups if tables & {id(each) for each in group["params"]}]
    assert len(tables) == 12 and found
    assert all(group["weight_decay"] == 0 and not group.get("matrix") for group in found)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_goes_on_from_its_state_to_the_last_bit(name: str) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2))
    net.to(memory_format=torch.channels_last)
    chosen = recipe(optimiser=name, lr=0.01)

    def groups(of: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
        parameters = list(of.parameters())
        return [(parameters[:-2], 0.01), (parameters[-2:], 0.02)]

    def train(of: nn.Module, by: torch.optim.Optimizer, falling: Any, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(steps):
            loss = of(torch.randn(4, 3, 8, 8)).square().mean()
            by.zero_grad()
            loss.backward()
            by.step()
            falling.step()

    one = optimiser(groups(net), chosen)
    falling = schedule(one, chosen, 10)
    train(net, one, falling, 5, seed=2)
    other = copy.deepcopy(net)
    two = optimiser(groups(other), chosen)
    falling_too = schedule(two, chosen, 10)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    falling_too.load_state_dict(falling.state_dict())
    for of, by, each in ((net, one, falling), (other, two, falling_too)):
        train(of, by, each, 5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_muon_s_update_has_the_singular_vectors_and_nearly_equal_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64)
    found = orthogonalised(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ found @ v.T
    assert torch.allclose(values, torch.diag(torch.diagonal(values)), atol=1e-6)
    assert (torch.diagonal(values) > 0.5).all() and (torch.diagonal(values) < 1.3).all()


def test_muon_treats_the_head_and_norms_as_sgd_does() -> None:
    torch.manual_seed(1)
    nets = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))]
    nets.append(copy.deepcopy(nets[0]))
    for net, name in zip(nets, ("muon", "sgd"), strict=True):
        parameters = list(net.parameters())
        by = optimiser([(parameters[:-2], 0.1), (parameters[-2:], 0.1)], recipe(optimiser=name, weight_decay=0.0))
        net(torch.ones(3, 4)).square().sum().backward()
        by.step()
    muon, sgd = (list(net.parameters()) for net in nets)
    same = [bool(torch.allclose(a, b, atol=1e-6)) for a, b in zip(muon, sgd, strict=True)]
    assert same == [False, True, True, True, True, True]


def test_muon_s_matrices_have_a_rate_of_their_own() -> None:
    moved = []
    for scale in (1.0, 4.0):
        matrix, head = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(2, 4))
        chosen = recipe(optimiser="muon", muon_scale=scale, weight_decay=0.0)
        by = optimiser([([matrix], 0.1), ([head], 0.1)], chosen)
        matrix.grad, head.grad = torch.eye(4), torch.ones(2, 4)
        by.step()
        moved.append((float(matrix.norm()), float(head.norm())))
    assert moved[1] == pytest.approx((4 * moved[0][0], moved[0][1]))


def test_the_average_of_weights_follows_its_formula_and_goes_on_exactly() -> None:
    net: Any = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    ema = Ema(net, decay=0.5)
    expected = net[0].weight.item()
    for step in range(1, 6):
        with torch.no_grad():
            net[0].weight.fill_(step)
        net[1].num_batches_tracked.fill_(step)
        ema.update(net)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.model[0].weight.item() == pytest.approx(expected)
    assert ema.model[1].num_batches_tracked.item() == 5
    again = Ema(net, decay=0.5)
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.update(net)
    again.update(net)
    assert torch.equal(again.model[0].weight, ema.model[0].weight)
