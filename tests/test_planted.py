"""Planted permutations that are proved from a part of the columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedrebasin import PermutationSpec, invert, permute, random_perms, trace, weight_matching
from fedrebasin.assignment import solve_assignment
from fedrebasin.matching import anchored, planted
from fedrebasin.matching.problem import WeightProblem

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_networks_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "_LARGE", 1)


class Residual(nn.Module):
    """Convolutions with a stream, whose permutation no single tensor settles, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3)
        self.inner, self.norm, self.outer = nn.Conv2d(40, 80, 3), nn.BatchNorm2d(80), nn.Conv2d(80, 40, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x[:, :, 1:-1, 1:-1] + self.outer(self.norm(self.inner(x)).relu())
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def copy_of(net: nn.Module, spec: PermutationSpec, noise: float) -> tuple[State, State, dict[str, Tensor]]:
    """A network, its permuted copy with relative noise, and the permutations that put the copy back."""
    state = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    noisy = {
        name: x + noise * x.std() * torch.randn(x.shape, generator=generator) if x.ndim > 1 else x
        for name, x in state.items()
    }
    perms = random_perms(spec, 5)
    return state, permute(spec, perms, noisy), invert(spec, perms)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(700, 90), nn.ReLU(), nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 70))


def networks() -> list[tuple[nn.Module, PermutationSpec]]:
    layered, residual = mlp(), Residual()
    return [
        (layered, trace(layered, (torch.randn(2, 700),))),
        (residual, trace(residual, (torch.randn(2, 3, 12, 12),))),
    ]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_is_proved_is_the_truth_and_takes_no_product_of_all_columns(
    monkeypatch: pytest.MonkeyPatch, place: int, noise: float
) -> None:
    net, spec = networks()[place]
    state, other, truth = copy_of(net, spec, noise)
    proved: list[bool] = []

    def counted(*given: object) -> Tensor | None:
        found = planted.planted_order(*given)  # type: ignore[arg-type]
        proved.append(found is not None)
        return found

    monkeypatch.setattr(anchored, "planted_order", counted)
    found = weight_matching(spec, state, other)
    assert all(torch.equal(found.perms[name], order) for name, order in truth.items())
    assert proved and all(proved)
    monkeypatch.setattr(anchored, "worth_a_proof", lambda *_: False)
    whole = weight_matching(spec, state, other)
    assert found.objective == pytest.approx(whole.objective, rel=1e-9)
    assert all(torch.equal(found.perms[name], order) for name, order in whole.perms.items())


def test_what_is_proved_of_one_permutation_is_its_best_assignment() -> None:
    net, spec = networks()[0]
    state, other, _ = copy_of(net, spec, 0.3)
    problem = WeightProblem(spec, state, other)
    block = problem.blocks[0]
    order = planted.planted_order(problem, block, ["0.weight", "0.bias"])
    assert order is not None
    assert torch.equal(order, solve_assignment(problem.similarity(block, {"0.weight", "0.bias"})))
    assert not planted.stays_planted(problem, block)
    problem.put({block.perm: order}, [block.perm])
    assert not planted.stays_planted(problem, block)  # the next layer is still in another order
    problem.put(weight_matching(spec, state, other).perms, list(spec.perm_shapes))
    assert all(planted.stays_planted(problem, block) for block in problem.blocks)


@pytest.mark.parametrize("why", ["noise", "independent", "two units alike"])
def test_nothing_is_proved_where_it_is_not_sure_and_matching_goes_on_as_ever(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    net, spec = networks()[0]
    state, other, _ = copy_of(net, spec, 1.0 if why == "noise" else 0.1)
    if why == "independent":
        other = {name: tensor.detach() for name, tensor in mlp(1).state_dict().items()}
    if why == "two units alike":
        state["0.weight"][1] = state["0.weight"][0] + 1e-4
    problem = WeightProblem(spec, state, other)
    assert planted.planted_order(problem, problem.blocks[0], ["0.weight"]) is None
    found = weight_matching(spec, state, other)
    monkeypatch.setattr(anchored, "worth_a_proof", lambda *_: False)
    whole = weight_matching(spec, state, other)
    assert all(torch.equal(found.perms[name], order) for name, order in whole.perms.items())
    assert found.history == whole.history


def test_a_nan_proves_nothing() -> None:
    net, spec = networks()[0]
    state, other, _ = copy_of(net, spec, 0.1)
    problem = WeightProblem(spec, state, other)
    problem.model["0.weight"][0, -1] = torch.nan
    assert planted.planted_order(problem, problem.blocks[0], ["0.weight"]) is None


@pytest.mark.parametrize("zero", [["3.weight"], ["0.weight", "2.weight", "4.weight"]])
def test_tensors_that_are_zero_tell_nothing(zero: list[str]) -> None:
    net = nn.Sequential(nn.Linear(700, 90), nn.ReLU(), nn.Linear(90, 70), nn.Linear(70, 70), nn.Linear(70, 70))
    spec = trace(net, (torch.randn(2, 700),))
    state, other, _ = copy_of(net, spec, 0.1)
    for name in set(zero) & set(state):
        state[name].zero_()
        other[name].zero_()
    found = weight_matching(spec, state, other)
    assert found.objective >= found.objective_before


def test_small_networks_and_families_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    net, spec = networks()[0]
    state, other, _ = copy_of(net, spec, 0.0)
    problem = WeightProblem(spec, state, other)
    block = problem.blocks[0]
    assert planted.worth_a_proof(problem, [block], ["0.weight"])
    assert not planted.worth_a_proof(problem, [block], ["0.bias"])
    assert not planted.worth_a_proof(problem, [block, problem.blocks[1]], ["0.weight"])
    monkeypatch.setattr(planted, "_LARGE", 1 << 19)
    assert not planted.worth_a_proof(problem, [block], ["0.weight"])
