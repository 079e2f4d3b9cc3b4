"""Sinkhorn matching, without data and with it, against planted truth, slow oracles and limit cases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_frank_wolfe_matching import MAKERS, State, all_objectives, line, pair, tiny
from test_matching_families import noisy
from test_straight_through import case, data, loss_at
from torch import Tensor, nn

from fedrebasin import (
    CalibrationError,
    RebasinError,
    SpecMismatchError,
    identity_perms,
    invert,
    permute,
    random_perms,
    sinkhorn_matching,
    trace,
    weight_matching,
)
from fedrebasin.matching.doubly_stochastic import GRADIENTS
from fedrebasin.matching.methods import MatchingSetting, find_matching
from fedrebasin.matching.result import inner_product
from fedrebasin.matching.sinkhorn import _Logits


def same(one: State, other: State) -> bool:
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("name", "noise", "gradient"),
    [
        *((name, noise, gradient) for name in ("mlp", "conv") for noise in (0.0, 0.5) for gradient in GRADIENTS),
        *((name, 0.5, "implicit") for name in ("gru", "encoder", "resnet20-layernorm")),
    ],
)
def test_a_planted_permutation_is_recovered(name: str, noise: float, gradient: str) -> None:
    spec, state, _ = pair(name)
    planted = random_perms(spec, 1)
    moved = permute(spec, planted, noisy(spec, state, noise, 2))
    steps = 50 if name == "encoder" else 25
    assert same(sinkhorn_matching(spec, state, moved, steps=steps, gradient=gradient).perms, invert(spec, planted))


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_near_a_start_half_of_each_unit_is_in_its_place(tau: float) -> None:
    spec, _, _ = pair("mlp")
    near = random_perms(spec, 1)
    logits = _Logits(spec, torch.zeros(()), near, lr=0.1, tau=tau, gradient="implicit", iterations=1, seed=0)
    for perm, P in logits.soft().items():
        torch.testing.assert_close(P[torch.arange(len(P)), near[perm]], torch.full((len(P),), 0.5), rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_one_hidden_layer_is_solved_exactly(size: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        one, other = line(3, size, 2), line(3, size, 2)
        spec = trace(one, (torch.zeros(2, 3),))
        a, b = one.state_dict(), other.state_dict()
        found = sinkhorn_matching(spec, a, b, steps=60)
        assert found.objective == pytest.approx(all_objectives(spec, a, b)[-1], rel=1e-9)


def test_it_is_near_the_best_of_all_choices_and_never_above() -> None:
    for seed in range(2):
        spec, a, b = tiny(seed)
        every = all_objectives(spec, a, b)
        assert every[-5] <= sinkhorn_matching(spec, a, b, steps=60).objective <= every[-1] + 1e-9  # of 144


@pytest.mark.parametrize("name", MAKERS)
def test_the_objective_is_what_it_says_and_never_below_the_starts(name: str) -> None:
    spec, a, b = pair(name)
    start = random_perms(spec, 1)
    for init, at_start in ((None, inner_product(spec, a, b)), (start, inner_product(spec, a, permute(spec, start, b)))):
        found = sinkhorn_matching(spec, a, b, init=init, steps=4)
        assert found.objective == inner_product(spec, a, permute(spec, found.perms, b))
        assert found.objective_before == inner_product(spec, a, b)
        assert found.history[0] == at_start and found.history[-1] == found.objective
        assert list(found.history) == sorted(found.history)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("options", [{"lr": 1e3}, {"lr": 1e-9}, {"tau": 1e-3}, {"tau": 1e3}])
def test_steps_of_any_size_and_any_tau_keep_the_best_that_was_seen(options: dict[str, float], gradient: str) -> None:
    spec, a, b = pair("conv")
    init = weight_matching(spec, a, b).perms
    disturbed = {**init, min(init): init[min(init)].roll(1)}
    for start in (identity_perms(spec), init, disturbed):
        found = sinkhorn_matching(spec, a, b, init=start, steps=5, gradient=gradient, **options)
        assert found.objective >= inner_product(spec, a, permute(spec, start, b))


def test_a_model_that_no_step_improves_is_kept_even_where_others_are_better() -> None:
    better = 0
    for seed in (12, 22, 25):
        spec, a, b = tiny(seed)
        settled = permute(spec, weight_matching(spec, a, b).perms, b)
        found = sinkhorn_matching(spec, a, settled)
        assert found.moved_fraction == 0 and len(found.history) == 2
        better += sinkhorn_matching(spec, a, b, steps=60).objective > found.objective + 1e-3
    assert better > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_matched_and_inputs_are_left_as_they_were(dtype: torch.dtype) -> None:
    spec, a, _ = pair("mlp")
    a = {name: tensor.to(dtype) for name, tensor in a.items()}
    planted = random_perms(spec, 1)
    b = permute(spec, planted, a)
    before = copy.deepcopy((a, b))
    assert same(sinkhorn_matching(spec, a, b, steps=30).perms, invert(spec, planted))
    assert same(a, before[0]) and same(b, before[1])


def test_the_result_is_the_same_for_the_same_seed() -> None:
    spec, net, a, b = case(16, 12)
    for options in ({}, {"net": net, "batches": data(), "loss": F.cross_entropy, "lam": None}):
        first, second = (sinkhorn_matching(spec, a, b, seed=5, steps=9, **options) for _ in range(2))  # type: ignore[arg-type]
        assert same(first.perms, second.perms) and first.measures == second.measures


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("lam", [0.25, 0.5, None])
def test_the_loss_is_that_of_the_midpoint_and_falls(lam: float | None, gradient: str) -> None:
    spec, net, a, b = case(16, 12)
    init = random_perms(spec, 1)
    found = sinkhorn_matching(
        *(spec, a, b), net=net, batches=data(), loss=F.cross_entropy, lam=lam, gradient=gradient, init=init, steps=45
    )
    before, after = (loss_at(net, a, permute(spec, perms, b), lam or 0.5) for perms in (init, found.perms))
    assert found.measures["loss-before"] == pytest.approx(before, rel=1e-5)
    assert found.measures["loss"] == pytest.approx(after, rel=1e-5)
    assert found.measures["loss"] < 0.7 * found.measures["loss-before"]


def test_with_data_it_starts_from_weight_matching_and_ends_nowhere_above() -> None:
    spec, net, a, b = case(16, 12)
    at_start = loss_at(net, a, permute(spec, weight_matching(spec, a, b).perms, b), 0.5)
    for lr, steps in ((1e-9, 3), (0.1, 100), (1e3, 12)):
        found = sinkhorn_matching(spec, a, b, net=net, batches=data(), loss=F.cross_entropy, lr=lr, steps=steps)
        assert found.measures["loss-before"] == pytest.approx(at_start, rel=1e-5)
        assert found.measures["loss"] <= found.measures["loss-before"]
        assert lr != 0.1 or found.measures["loss"] < found.measures["loss-before"]


def test_the_callers_model_and_states_are_left_as_they_were() -> None:
    spec, net, a, b = case(16, 12)
    net.train()
    before = copy.deepcopy((net.state_dict(), a, b))
    with torch.no_grad():  # the caller's mode does not matter
        sinkhorn_matching(spec, a, b, net=net, batches=data(), loss=F.cross_entropy, steps=5)
        sinkhorn_matching(spec, a, b, steps=2)
    assert net.training and all(parameter.grad is None for parameter in net.parameters())
    assert all(same(state, expected) for state, expected in zip((net.state_dict(), a, b), before, strict=True))


def test_a_loss_that_breaks_in_training_leaves_the_best_so_far(caplog: pytest.LogCaptureFixture) -> None:
    spec, net, a, b = case(16, 12)
    calls = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        return F.cross_entropy(output, target) * (torch.nan if calls[0] == 11 else 1)

    with caplog.at_level("WARNING", logger="fedrebasin"):
        found = sinkhorn_matching(spec, a, b, net=net, batches=data(), loss=loss)
    assert "the loss became NaN or infinite; the best so far is kept" in caplog.text
    assert found.measures["loss"] <= found.measures["loss-before"] and calls[0] == 11


def test_by_name_it_uses_data_only_if_there_is_a_loss() -> None:
    spec, net, a, b = case(4, 3)
    assert not find_matching("sinkhorn", MatchingSetting(spec, net, data()), a, b).measures
    assert (
        find_matching("sinkhorn", MatchingSetting(spec, net, data(), loss=F.cross_entropy), a, b).measures["loss"] > 0
    )
    with pytest.raises(RebasinError, match="matching='sinkhorn' needs the network's module"):
        find_matching("sinkhorn", MatchingSetting(spec, calibration=data(), loss=F.cross_entropy), a, b)


def test_a_net_without_perms_is_matched_by_nothing() -> None:
    net = nn.Linear(4, 3)
    spec, state = trace(net, (torch.zeros(1, 4),)), net.state_dict()
    assert sinkhorn_matching(spec, state, state, steps=3).perms == {}
    assert sinkhorn_matching(spec, state, state, net=net, batches=data(), loss=F.cross_entropy, steps=3).perms == {}


def test_bad_input_is_refused_with_the_remedy() -> None:
    spec, net, a, b = case(4, 3)
    x, y = data()[0]
    for name, value in (("steps", 0), ("lr", 0.0), ("tau", -1.0), ("iterations", 0), ("lam", 1.0), ("gradient", "no")):
        with pytest.raises(RebasinError, match=f"{name}: expected .*; got {value}"):
            sinkhorn_matching(spec, a, b, **{name: value})
    with pytest.raises(RebasinError, match="batches: expected net, batches and loss together, or none of them"):
        sinkhorn_matching(spec, a, b, net=net, loss=F.cross_entropy)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ([x], F.cross_entropy, CalibrationError, r"batches: expected \(input, target\) pairs; got a batch without"),
        (iter([(x, y)]), F.cross_entropy, CalibrationError, "batches: expected a collection that can be read more"),
        ([(x * torch.nan, y)], F.cross_entropy, CalibrationError, "batches: the loss at the start is nan; check"),
    ]
    for batches, loss, kind, message in cases:
        with pytest.raises(kind, match=message):
            sinkhorn_matching(spec, a, b, net=net, batches=batches, loss=loss)
    with pytest.raises(SpecMismatchError, match=r"model: '0.bias' holds a NaN, an infinity or numbers"):
        sinkhorn_matching(spec, a, {**b, "0.bias": torch.full((4,), torch.nan)})
    with pytest.raises(SpecMismatchError, match=r"model: expected '0.bias' as \(4,\); got \(5,\)"):
        sinkhorn_matching(spec, a, {**b, "0.bias": torch.zeros(5)}, net=net, batches=data(), loss=F.cross_entropy)
    with pytest.raises(SpecMismatchError, match="perms: '0' is not a permutation"):
        sinkhorn_matching(spec, a, b, init={**identity_perms(spec), "0": torch.arange(1, 5)})
