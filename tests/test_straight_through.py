"""Straight-through matching against planted truth, a slow oracle and limit cases."""

from __future__ import annotations

import copy
from functools import cache
from itertools import permutations, product
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from test_matching_families import encoder, noisy
from torch import Tensor, nn

from fedrebasin import (
    CalibrationError,
    PermutationSpec,
    RebasinError,
    SpecMismatchError,
    interpolate,
    invert,
    loss_along_path,
    permute,
    random_perms,
    straight_through_matching,
    trace,
    weight_matching,
)
from fedrebasin.matching.methods import METHODS, MatchingSetting, find_matching

State = dict[str, Tensor]
Data = list[tuple[Tensor, Tensor]]


@cache
def data() -> tuple[tuple[Tensor, Tensor], ...]:
    """Four features, three classes by the nearest of three centres; batches of unequal size."""
    generator = torch.Generator().manual_seed(0)
    x, centres = torch.randn(200, 4, generator=generator), torch.randn(3, 4, generator=generator)
    y = torch.cdist(x, centres).argmin(1)
    return tuple(zip(x.split([64, 64, 72]), y.split([64, 64, 72]), strict=True))


def net_of(*widths: int) -> nn.Sequential:
    sizes = [4, *widths]
    hidden = [layer for index in range(len(widths)) for layer in (nn.Linear(*sizes[index : index + 2]), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 3))


@cache
def trained(seed: int, *widths: int) -> State:
    torch.manual_seed(seed)
    net = net_of(*widths)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(30):
        for x, y in data():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def case(*widths: int) -> tuple[PermutationSpec, nn.Module, State, State]:
    net = net_of(*widths)
    return trace(net, (torch.zeros(2, 4),)), net, trained(0, *widths), trained(1, *widths)


def loss_at(net: nn.Module, a: State, b: State, lam: float) -> float:
    return loss_along_path(net, a, b, list(data()), loss=F.cross_entropy, lams=[0, lam, 1]).losses[1]


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_a_planted_permutation_is_recovered(noise: float) -> None:
    spec, net, a, _ = case(16, 12)
    planted = random_perms(spec, 3)
    moved = permute(spec, planted, noisy(spec, a, noise, 2))
    found = straight_through_matching(spec, net, a, moved, data(), loss=F.cross_entropy, epochs=1)
    assert found.measures["loss"] <= loss_at(net, a, permute(spec, invert(spec, planted), moved), 0.5) + 1e-6
    if noise == 0:
        assert all(torch.equal(found.perms[perm], order) for perm, order in invert(spec, planted).items())


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_the_loss_is_that_of_the_midpoint_and_never_above_the_starts(lam: float) -> None:
    spec, net, a, b = case(16, 12)
    start = weight_matching(spec, a, b).perms
    found = straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy, lam=lam, epochs=20)
    before, after = (loss_at(net, a, permute(spec, perms, b), lam) for perms in (start, found.perms))
    assert found.measures["loss-before"] == pytest.approx(before, rel=1e-5)
    assert found.measures["loss"] == pytest.approx(after, rel=1e-5)
    assert found.measures["loss"] < found.measures["loss-before"]


@pytest.mark.parametrize("lr", [1e-9, 100.0])
def test_steps_of_any_size_keep_the_best_that_was_seen(lr: float) -> None:
    spec, net, a, b = case(16, 12)
    found = straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy, lr=lr, epochs=3)
    assert found.measures["loss"] <= found.measures["loss-before"]
    if lr < 1:
        assert all(torch.equal(order, weight_matching(spec, a, b).perms[perm]) for perm, order in found.perms.items())


def test_a_start_may_be_given_and_is_what_the_loss_before_is_of() -> None:
    spec, net, a, b = case(16, 12)
    init = random_perms(spec, 1)
    found = straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy, init=init, epochs=3)
    assert found.measures["loss-before"] == pytest.approx(loss_at(net, a, permute(spec, init, b), 0.5), rel=1e-5)
    assert found.measures["loss"] < found.measures["loss-before"]
    assert found.objective_before == pytest.approx(weight_matching(spec, a, b).objective_before, rel=1e-6)


def test_no_permutation_of_a_tiny_net_is_much_better() -> None:
    spec, net, a, b = case(4, 3)
    losses = sorted(
        loss_at(net, a, permute(spec, {"0": torch.tensor(first), "2": torch.tensor(second)}, b), 0.5)
        for first, second in product(permutations(range(4)), permutations(range(3)))
    )
    init = {"0": torch.tensor([3, 2, 1, 0]), "2": torch.tensor([2, 0, 1])}
    found = straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy, init=init, epochs=60, lr=0.1)
    assert losses[0] - 1e-6 <= found.measures["loss"] <= losses[4]  # of 144


def test_the_result_is_the_same_for_the_same_seed() -> None:
    spec, net, a, b = case(16, 12)
    first, second = (straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy) for _ in range(2))
    assert all(torch.equal(order, second.perms[perm]) for perm, order in first.perms.items())
    assert first.measures == second.measures


@pytest.mark.parametrize("make", [networks.NETWORKS["resnet20-batchnorm"], networks.NETWORKS["two-inputs"], encoder])
def test_norms_shared_weights_dicts_and_heads_are_trained(make: Any) -> None:
    torch.manual_seed(0)
    (net, inputs), (other, _) = make(), make()
    spec = trace(net, inputs)
    torch.manual_seed(1)
    x = {k: torch.randn_like(t) for k, t in inputs.items()} if isinstance(inputs, dict) else torch.randn_like(inputs[0])
    pairs = [(x, torch.zeros(2, dtype=torch.int64))]

    def loss(output: Any, target: Tensor) -> Tensor:
        values = output["again"] if isinstance(output, dict) else output
        return F.cross_entropy(values.flatten(0, -2)[:2], target)

    matching = straight_through_matching(spec, net, net.state_dict(), other.state_dict(), pairs, loss=loss, epochs=2)
    assert matching.measures["loss"] <= matching.measures["loss-before"]


def test_a_net_without_perms_and_one_of_half_precision() -> None:
    net = nn.Linear(4, 3)
    state = net.state_dict()
    found = straight_through_matching(trace(net, (torch.zeros(1, 4),)), net, state, state, data(), loss=F.cross_entropy)
    assert found.perms == {} and found.measures["loss"] == found.measures["loss-before"]
    spec, net, a, b = case(16, 12)
    halves = [{name: tensor.bfloat16() for name, tensor in state.items()} for state in (a, b)]
    found = straight_through_matching(spec, net, *halves, data(), loss=F.cross_entropy, epochs=2)
    assert found.measures["loss"] <= found.measures["loss-before"]


def test_the_callers_model_and_states_are_left_as_they_were() -> None:
    spec, net, a, b = case(16, 12)
    net.train()
    before, ends = copy.deepcopy(net.state_dict()), copy.deepcopy((a, b))
    straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy, epochs=1)
    assert net.training and all(parameter.grad is None for parameter in net.parameters())
    for found, expected in ((net.state_dict(), before), (a, ends[0]), (b, ends[1])):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_bad_input_is_refused_with_the_remedy() -> None:
    spec, net, a, b = case(4, 3)
    x, y = data()[0]
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ([x], F.cross_entropy, CalibrationError, r"batches: expected \(input, target\) pairs; got a batch without"),
        ([], F.cross_entropy, CalibrationError, "batches: expected at least one batch; got none"),
        (iter([(x, y)]), F.cross_entropy, CalibrationError, "batches: expected a collection that can be read more"),
        ([(x * torch.nan, y)], F.cross_entropy, CalibrationError, "batches: the loss at the start is nan; check"),
        ([(x, y)], lambda o, t: o, RebasinError, r"loss: expected a scalar tensor .* got shape \(64, 3\)"),
        ([(x, y)], lambda o, t: 1.0, RebasinError, "loss: expected a scalar tensor .* got float"),
    ]
    for batches, loss, kind, message in cases:
        with pytest.raises(kind, match=message):
            straight_through_matching(spec, net, a, b, batches, loss=loss)
    for name, value in (("epochs", 0), ("lr", 0.0), ("lam", 0.0), ("lam", 1.0)):
        with pytest.raises(RebasinError, match=f"{name}: expected .*; got {value}"):
            straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy, **{name: value})
    with pytest.raises(SpecMismatchError, match=r"model: expected '0.bias' as \(4,\); got \(5,\)"):
        straight_through_matching(spec, net, a, {**b, "0.bias": torch.zeros(5)}, data(), loss=F.cross_entropy)


def test_a_loss_that_breaks_in_training_leaves_the_best_so_far(caplog: pytest.LogCaptureFixture) -> None:
    spec, net, a, b = case(16, 12)
    calls = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        return F.cross_entropy(output, target) * (torch.nan if calls[0] == 11 else 1)

    with caplog.at_level("WARNING", logger="fedrebasin"):
        found = straight_through_matching(spec, net, a, b, data(), loss=loss, epochs=9)
    assert "the loss became NaN or infinite; the best so far is kept" in caplog.text
    assert found.measures["loss"] <= found.measures["loss-before"] and calls[0] == 11


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_name_and_says_what_it_needs(name: str) -> None:
    spec, net, a, b = case(16, 12)
    setting = MatchingSetting(spec, net, data(), loss=F.cross_entropy)
    found = find_matching(name, setting, a, b)
    assert loss_at(net, a, permute(spec, found.perms, b), 0.5) < loss_at(net, a, b, 0.5)
    if METHODS[name].inputs:
        with pytest.raises(RebasinError, match="needs the network's module"):
            find_matching(name, MatchingSetting(spec, calibration=data(), loss=F.cross_entropy), a, b)
        with pytest.raises(RebasinError, match="needs calibration batches"):
            find_matching(name, MatchingSetting(spec, net, loss=F.cross_entropy), a, b)
    if METHODS[name].targets:
        with pytest.raises(RebasinError, match="needs loss=, a function of output and target"):
            find_matching(name, MatchingSetting(spec, net, data()), a, b)
    with pytest.raises(RebasinError, match=r"matching: expected one of weight, activation, .*; got 'magic'"):
        find_matching("magic", setting, a, b)


def test_interpolating_what_is_found_is_what_was_measured() -> None:
    spec, net, a, b = case(16, 12)
    found = straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy)
    net.load_state_dict(interpolate(a, permute(spec, found.perms, b), 0.5))
    with torch.no_grad():
        total = sum(float(F.cross_entropy(net(x), y, reduction="sum")) for x, y in data())
    assert total / 200 == pytest.approx(found.measures["loss"], rel=1e-5)
