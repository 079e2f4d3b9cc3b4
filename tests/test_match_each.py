"""Many models against one reference, and the certificate that lets near ones pass."""

from __future__ import annotations

from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedrebasin import (
    PermutationSpec,
    RebasinError,
    match_each,
    match_many,
    permute,
    random_perms,
    trace,
    weight_matching,
)
from fedrebasin.matching import each
from fedrebasin.matching.certificate import IdentityCertificate, margins_of
from fedrebasin.matching.numbers import PIECE
from fedrebasin.matching.plan import plan_of

State = dict[str, Tensor]


def _net(name: str) -> tuple[PermutationSpec, State]:
    torch.manual_seed(0)
    net, inputs = networks.NETWORKS[name]()
    return trace(net, inputs), net.state_dict()


def _moved(state: State, relative: float, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + relative * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and tensor.numel() > 1
        else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20-batchnorm", "dense-block", "grouped"])
def test_each_model_gets_what_it_gets_alone(name: str) -> None:
    spec, reference = _net(name)
    near = [_moved(reference, 0.01, seed) for seed in range(3)]
    far = permute(spec, random_perms(spec, 3), near[0])
    models = [*near, far, near[1]]
    found = match_each(spec, reference, models)
    for matching, model in zip(found, models, strict=True):
        alone = weight_matching(spec, reference, model)
        assert all(torch.equal(matching.perms[key], perm) for key, perm in alone.perms.items())
        assert matching.objective == pytest.approx(alone.objective, rel=1e-6)
    assert found[3].moved_fraction > 0


def test_the_certificate_holds_only_where_no_assignment_is_better() -> None:
    spec, reference = _net("mlp")
    certificate = IdentityCertificate(spec, reference)
    verdicts = set()
    for seed, relative in enumerate([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.2, 2.0] * 20):
        model = _moved(reference, relative, seed)
        holds = certificate.holds(model)
        verdicts.add(holds)
        if holds:
            assert weight_matching(spec, reference, model).moved_fraction == 0
    assert verdicts == {True, False}


def test_a_reference_with_two_equal_units_certifies_nothing_but_itself_moved_by_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spec, state = trace(net, (torch.zeros(1, 3),)), net.state_dict()
    state["0.weight"][1], state["0.bias"][1] = state["0.weight"][0], state["0.bias"][0]
    state["2.weight"][:, 1] = state["2.weight"][:, 0]
    assert not IdentityCertificate(spec, state).holds(_moved(state, 1e-3, 1))


def test_a_nan_is_never_certified() -> None:
    spec, reference = _net("mlp")
    broken = {name: tensor.clone() for name, tensor in reference.items()}
    next(iter(broken.values()))[0] = float("nan")
    assert not IdentityCertificate(spec, reference).holds(broken)
    with pytest.raises(RebasinError, match="holds a NaN"):
        match_each(spec, reference, [reference, reference, broken])


def test_near_models_are_not_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, reference = _net("mlp")
    calls = []
    monkeypatch.setattr(each, "weight_matching", lambda *args, **kw: calls.append(1) or weight_matching(*args, **kw))
    match_each(spec, reference, [_moved(reference, 0.01, seed) for seed in range(5)])
    assert not calls


def test_last_rounds_perms_are_the_start() -> None:
    spec, reference = _net("mlp")
    perms = random_perms(spec, 5)
    model = permute(spec, perms, reference)
    truth = weight_matching(spec, reference, model).perms
    (found,) = match_each(spec, reference, [model], inits=[truth])
    assert found.history[0] == found.objective
    with pytest.raises(RebasinError, match="inits: expected one for each of the 1 models; got 2"):
        match_each(spec, reference, [model], inits=[truth, truth])


def test_a_network_without_permutations_stays_as_it_is() -> None:
    net = torch.nn.Linear(2, 3)
    spec, state = trace(net, (torch.zeros(1, 2),)), net.state_dict()
    assert IdentityCertificate(spec, state).holds_each([state, state]) == [True, True]
    assert IdentityCertificate(spec, state).holds_each([]) == []


def test_a_margin_over_some_columns_is_at_most_the_margin_over_all() -> None:
    spec, reference = _net("vgg11")
    certificate = IdentityCertificate(spec, reference)
    for block in certificate.changes([reference]):
        assert bool((certificate._margin(block, True) <= certificate._margin(block, False)).all())


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that is made on the way."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, made.numel())
        return made


def test_margins_are_a_fourth_of_the_least_squared_distance_and_made_in_pieces() -> None:
    x = torch.randn(1100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x @ x.T
    assert gram.numel() > PIECE
    with Largest() as largest:
        margins = margins_of(gram)
    assert largest.entries <= PIECE
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square().fill_diagonal_(torch.inf)
    torch.testing.assert_close(margins, distances.amin(1) / 4, rtol=0, atol=1e-5 * float(gram.diagonal().max()))
    assert bool((margins <= distances.amin(1) / 4).all())


def test_changes_are_the_squared_distances_of_units() -> None:
    spec, reference = _net("resnet20-batchnorm")
    model = _moved(reference, 0.3, 1)
    plan = plan_of(spec)
    for block, moved in IdentityCertificate(spec, reference).changes([model]).items():
        rows = torch.cat(
            [term.rows((model[term.name] - reference[term.name]).double()) for term in plan.terms[block]], 1
        )
        torch.testing.assert_close(moved[0].double(), rows.square().sum(1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("exponent", [-30, -22, 25])
def test_permuted_copies_of_tiny_and_huge_weights_are_recovered_and_not_certified(exponent: int) -> None:
    spec, state = _net("mlp")
    scaled = {name: tensor * 10.0**exponent for name, tensor in state.items()}
    moved = permute(spec, random_perms(spec, 1), scaled)
    perms = [found.perms for found in (weight_matching(spec, scaled, moved), *match_each(spec, scaled, [moved]))]
    for found in (*perms, match_many(spec, [scaled, moved]).perms[1]):
        assert all(torch.equal(tensor, scaled[name]) for name, tensor in permute(spec, found, moved).items())
