"""Many models without a reference: every method against planted truth, oracles and limit cases."""

from __future__ import annotations

import copy
import itertools

import networks
import networks_attention
import networks_recurrent
import pytest
import torch
from test_many_problem import slow_objective, tiny
from torch import nn

from fedrebasin import (
    RebasinError,
    SpecMismatchError,
    compose,
    identity_perms,
    invert,
    match_many,
    merge,
    permute,
    random_perms,
    trace,
)
from fedrebasin.matching.many import MANY_METHODS

METHODS = list(MANY_METHODS)
ZOO = {name: make for name, make in networks.NETWORKS.items() if name in ("mlp", "resnet20-layernorm")} | {
    "attention": lambda: networks_attention.ATTENTION["multihead"]()[:2],
    "recurrent": lambda: networks_recurrent.RECURRENT["lstm"]()[:2],
}


@pytest.mark.parametrize("network", ZOO)
@pytest.mark.parametrize("method", METHODS)
def test_planted_copies_come_into_the_order_of_the_heaviest(method: str, network: str) -> None:
    torch.manual_seed(0)
    net, inputs = ZOO[network]()
    spec, state = trace(net, inputs), net.state_dict()
    copies = [permute(spec, random_perms(spec, seed), state) for seed in range(4)]
    found = match_many(spec, copies, coefficients=[0.1, 0.5, 0.2, 0.2], method=method)
    aligned = [permute(spec, perms, copy) for perms, copy in zip(found.perms, copies, strict=True)]
    for name, truth in identity_perms(spec).items():
        assert torch.equal(found.perms[1][name], truth)
    assert all(torch.equal(one[name], copies[1][name]) for one in aligned for name in copies[1])


@pytest.mark.parametrize("method", METHODS)
def test_the_permutations_around_a_cycle_compose_to_the_identity(method: str) -> None:
    spec, models = tiny(8)
    found = match_many(spec, models, method=method).perms
    around = identity_perms(spec)
    for p, q in itertools.pairwise([0, 2, 1, 3, 0]):  # what brings q's units into p's order
        around = compose(spec, compose(spec, found[q], invert(spec, found[p])), around)
    assert all(
        torch.equal(perm, truth) for perm, truth in zip(around.values(), identity_perms(spec).values(), strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_objective_is_the_sum_over_weighted_pairs(method: str) -> None:
    spec, models = tiny(8)
    coefficients = [0.4, 0.3, 0.2, 0.1]
    found = match_many(spec, models, coefficients=coefficients, method=method)
    assert found.objective == pytest.approx(slow_objective(spec, models, found.perms, coefficients), rel=1e-9)
    start = [identity_perms(spec) for _ in models]
    assert found.objective_before == pytest.approx(slow_objective(spec, models, start, coefficients), rel=1e-9)
    assert found.history[0] == found.objective_before and found.history[-1] == found.objective
    if method not in ("star", "medoid"):
        assert list(found.history) == sorted(found.history) and found.objective > found.objective_before


def test_merge_many_gains_more_than_the_stars() -> None:
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)) for _ in range(5)
    ]
    spec, models = trace(nets[0], (torch.zeros(2, 30),)), [net.state_dict() for net in nets]
    objective = {method: match_many(spec, models, method=method).objective for method in METHODS}
    assert objective["merge-many"] > max(objective["star"], objective["medoid"])


def test_models_that_nothing_improves_stay_as_they_are() -> None:
    spec, models = tiny(8)
    near = [{name: tensor + 1e-3 * k for name, tensor in models[0].items()} for k in range(3)]
    for method in METHODS:
        found = match_many(spec, near, method=method)
        assert found.moved_fraction == 0 and found.objective == found.objective_before


def test_a_medoid_is_the_centre_of_the_best_star_by_pairs() -> None:
    spec, models = tiny(8)
    near = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in models[2].items()}
    models = [
        models[0],
        permute(spec, random_perms(spec, 1), near),
        models[2],
        permute(spec, random_perms(spec, 2), near),
    ]
    found = match_many(spec, models, coefficients=[0.4, 0.2, 0.2, 0.2], method="medoid").perms
    for q in (2, 3):  # both are found by way of model 1, or 3, not of the heaviest
        between = compose(spec, found[q], invert(spec, found[1]))
        pair = match_many(spec, [models[1], models[q]]).perms[1]
        assert all(torch.equal(between[name], perm) for name, perm in pair.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_weight_zero_has_no_say_and_is_matched_in_the_end(method: str) -> None:
    spec, models = tiny(8)
    copy = permute(spec, random_perms(spec, 5), models[0])
    found = match_many(spec, [*models[:3], copy], coefficients=[0.6, 0.2, 0.2, 0.0], method=method)
    without = match_many(spec, models[:3], coefficients=[0.6, 0.2, 0.2], method=method)
    assert found.objective == pytest.approx(without.objective, rel=1e-12)
    for one, other in zip(found.perms, without.perms, strict=False):
        assert all(torch.equal(one[name], other[name]) for name in one)
    back = permute(spec, found.perms[3], copy)
    assert all(torch.equal(back[name], tensor) for name, tensor in models[0].items())


@pytest.mark.parametrize("method", METHODS)
def test_one_model_stays_and_two_are_matched_as_a_pair(method: str) -> None:
    spec, models = tiny(8)
    alone = match_many(spec, models[:1], method=method)
    assert alone.moved_fraction == 0 and alone.objective == pytest.approx(0, abs=1e-12)
    copy = permute(spec, random_perms(spec, 3), models[0])
    found = match_many(spec, [models[0], copy], coefficients=[1, 3], method=method)
    assert all(torch.equal(a, b) for a, b in zip(found.perms[1].values(), identity_perms(spec).values(), strict=True))
    assert all(torch.equal(tensor, copy[name]) for name, tensor in permute(spec, found.perms[0], models[0]).items())


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_and_scales_far_apart_are_matched(method: str) -> None:
    spec, models = tiny(8)
    half = [{name: tensor.half() for name, tensor in models[0].items()}]
    half += [permute(spec, random_perms(spec, seed), half[0]) for seed in (1, 2)]
    for name, scale in (("float16", 1.0), ("huge", 1e25)):
        copies = [half[0], *({k: t.double() * scale for k, t in copy.items()} for copy in half[1:])]
        copies = half if name == "float16" else copies
        found = match_many(spec, copies, method=method)
        for perms, other in zip(found.perms, half, strict=True):
            assert all(torch.equal(tensor, half[0][key]) for key, tensor in permute(spec, perms, other).items()), name


def test_what_is_no_model_or_method_is_refused() -> None:
    spec, models = tiny()
    with pytest.raises(RebasinError, match="expected at least one state dict"):
        match_many(spec, [])
    with pytest.raises(RebasinError, match=f"method: expected one of {', '.join(METHODS)}; got 'fastest'"):
        match_many(spec, models, method="fastest")
    with pytest.raises(RebasinError, match="coefficients: expected 4, one for each model; got 2"):
        match_many(spec, models, coefficients=[1, 1])
    with pytest.raises(SpecMismatchError, match=r"models\[1\]: '0.weight' holds a NaN"):
        match_many(spec, [models[0], {**models[1], "0.weight": models[1]["0.weight"] * float("nan")}])
    with pytest.raises(SpecMismatchError, match=r"models\[2\]: .*'0.weight'.*"):
        match_many(spec, [*models[:2], {**models[2], "0.weight": torch.zeros(3)}], coefficients=[1, 0, 1])


def test_straight_through_many_on_data_ends_at_a_loss_no_higher_than_its_start() -> None:
    torch.manual_seed(1)
    data = [(x, (x[:, :3] * x[:, 3:]).argmax(1)) for x in torch.randn(8, 60, 6)]
    nets = [
        nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)) for _ in range(3)
    ]
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for inputs, targets in data * 10:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
    spec, models = trace(nets[0], (data[0][0],)), [net.state_dict() for net in nets]
    shares = [0.35, 0.33, 0.32]
    found = match_many(
        *(spec, models),
        coefficients=shares,
        method="straight-through-many",
        net=nets[0],
        batches=data,
        loss=nn.functional.cross_entropy,
    )
    aligned = [permute(spec, own, model) for own, model in zip(found.perms, models, strict=True)]
    merged = copy.deepcopy(nets[0])
    merged.load_state_dict(merge(aligned, coefficients=shares))
    loss = sum(nn.functional.cross_entropy(merged(inputs), targets).item() for inputs, targets in data) / 8
    assert found.measures["loss"] == pytest.approx(loss, rel=1e-4)
    assert found.measures["loss"] < found.measures["loss-before"]
    assert found.objective == pytest.approx(slow_objective(spec, models, found.perms, shares), rel=1e-6)


def test_data_is_refused_where_it_has_no_use_or_is_not_all_there() -> None:
    spec, models = tiny()
    net = nn.Linear(1, 1)
    with pytest.raises(RebasinError, match=r"with method='straight-through-many' only; got method='star' without batc"):
        match_many(spec, models, method="star", net=net)
    with pytest.raises(RebasinError, match="got method='straight-through-many' without net and batches"):
        match_many(spec, models, method="straight-through-many", loss=nn.functional.mse_loss)
