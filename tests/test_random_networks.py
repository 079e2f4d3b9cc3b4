"""What must hold of any network grown out of the supported pieces: function, bits, objectives, files, freedom.

Plans that once failed are kept as examples; each says what went wrong.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from random_networks import CHAINS, PLANS, Network, Piece, Plan
from torch import Tensor
from torch.func import functional_call

from fedrebasin import PermutationSpec, check_spec, compose, invert, permute, random_perms, trace, weight_matching

State = dict[str, Tensor]


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def one(kind: str, *numbers: int, chains: tuple[tuple[Piece, ...], ...] = ()) -> Piece:
    return Piece(kind, numbers, chains)  # type: ignore[arg-type]


def grown(plan: Plan) -> tuple[Network, PermutationSpec]:
    net = Network(plan).eval()
    return net, check_spec(net, trace(net, net.inputs(), strict=True), net.inputs())


def drawn(net: Network, spec: PermutationSpec, seed: int) -> State:
    """A state dict of random numbers, whose tied weights are equal and whose variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    own = net.state_dict()
    wide = {name: torch.complex128 if tensor.is_complex() else torch.float64 for name, tensor in own.items()}
    state = {name: torch.randn(x, generator=generator, dtype=wide[name]) for name, x in spec.shapes.items()}
    for name, tensor in own.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            state[name] = tensor
        elif "running" in name:
            state[name] = state[name].abs() + 0.5
    if net.head.weight is net.stem.weight:
        state["head.weight"] = state["stem.weight"]
    return state


def outputs(net: Network, state: State) -> Tensor:
    inputs = [x.double() if x.is_floating_point() else x for x in net.inputs()]
    with torch.no_grad():
        return functional_call(net.double(), state, tuple(inputs), tie_weights=False)


def same_bits(one: State, other: State) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


ONE_UNIT_TWICE = Plan("values", 1, (one("concatenated", 1, 0, 0, chains=((), ())),), "channels")
SHUFFLED_TWICE = Plan("values", 4, (one("shared", 0, 0, 0, chains=((one("shuffle", 1, 0, 0),), ())),), "mean")
PADDED_GROUPS = Plan("values", 4, (one("residual", 0, 0, 0, chains=((one("line_convolution", 1, 2, 1),), ())),), "mean")
GROUPS_ACROSS_GROUPS = Plan("values", 6, (one("within_groups", 2, 0, 0), one("channel_norm", 0, 1, 0)), "mean")
GROUPS_OF_COPIES = Plan("values", 2, (one("repeat", 1, 0, 0), one("image_convolution", 1, 2, 1)), "mean")
GRAM_OF_GROUPS = Plan("table", 8, (one("products_of_groups", 2, 2, 0),), "tied")


@example(ONE_UNIT_TWICE)  # a fixed axis without a reason became free in a view
@example(SHUFFLED_TWICE)  # a family of equal children was taken for a family
@example(PADDED_GROUPS)  # an axis cut into a copy of itself was twice in one axis
@example(GROUPS_ACROSS_GROUPS)  # groups that cut across units were said to have no rule
@example(GROUPS_OF_COPIES)  # two outer axes lay on one axis of a tensor
@example(GRAM_OF_GROUPS)  # units within groups met those of other groups, each in an order of its own
@given(PLANS)
@examples(50)
def test_permuting_a_random_network_leaves_its_outputs_unchanged(plan: Plan) -> None:
    net, spec = grown(plan)
    state = drawn(net, spec, 1)
    before, after = (outputs(net, each) for each in (state, permute(spec, random_perms(spec, 2), state)))
    assert float((after - before).abs().max()) <= 1e-8 * float(before.abs().max())


@given(PLANS)
@examples(15)
def test_perms_of_a_random_network_are_undone_and_composed_to_the_bit(plan: Plan) -> None:
    net, spec = grown(plan)
    state, first, second = drawn(net, spec, 1), random_perms(spec, 2), random_perms(spec, 3)
    moved = permute(spec, first, state)
    assert same_bits(permute(spec, invert(spec, first), moved), state)
    assert same_bits(permute(spec, compose(spec, first, second), state), permute(spec, second, moved))


@given(PLANS, st.booleans())
@examples(25)
def test_weight_matching_of_random_networks_never_ends_below_its_start(plan: Plan, planted: bool) -> None:
    net, spec = grown(plan)
    reference = drawn(net, spec, 1)
    model = permute(spec, random_perms(spec, 2), reference) if planted else drawn(net, spec, 3)
    matching = weight_matching(spec, reference, model)
    assert list(matching.history) == sorted(matching.history)
    assert matching.objective >= matching.objective_before
    aligned = permute(spec, matching.perms, model)
    names = {axis.name for axes in spec.tied.values() for axis in axes} - set(spec.buffers)
    slow = sum(float((reference[name] * aligned[name].conj()).real.sum()) for name in names)
    assert matching.objective == pytest.approx(slow, rel=1e-9, abs=1e-9)
    if planted:  # nothing is better than the truth
        assert slow <= sum(float(reference[name].abs().square().sum()) for name in names) * (1 + 1e-12)


@given(PLANS, st.randoms(use_true_random=False))
@examples(20)
def test_an_edited_spec_of_a_random_network_still_keeps_the_function(plan: Plan, chance: random.Random) -> None:
    net, spec = grown(plan)
    state = drawn(net, spec, 1)
    before = outputs(net, state)
    fixed = spec.fix(*(perm for perm in spec.perm_shapes if chance.random() < 0.4))
    fixed = fixed.rename({perm: f"p{index}" for index, perm in enumerate(fixed.perm_shapes)})
    partial = spec.only([name for name in spec.axes if chance.random() < 0.8])
    assert fixed.checked
    for edited in (fixed, partial):
        part = {name: tensor for name, tensor in state.items() if name in edited.axes}
        moved = {**state, **permute(edited, random_perms(edited, 2), part)}
        assert float((outputs(net, moved) - before).abs().max()) <= 1e-8 * float(before.abs().max())


@given(PLANS)
@examples(10)
def test_a_spec_of_a_random_network_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    _, spec = grown(plan)
    path: Path = tmp_path_factory.mktemp("spec") / "spec.json"
    spec.save(path)
    assert PermutationSpec.load(path) == spec and PermutationSpec.load(path).checked


@given(CHAINS, CHAINS, st.integers(1, 8), st.integers(0, 5))
@examples(15)
def test_the_freedom_of_pieces_that_a_linear_layer_parts_adds_up(
    first: tuple[Piece, ...], second: tuple[Piece, ...], width: int, between: int
) -> None:
    def freedom(width: int, *pieces: Piece) -> float:
        net = Network(Plan("values", width, pieces, "mean"))
        return trace(net, net.inputs(), strict=True).log10_order

    whole = freedom(width, *first, one("linear", between, 0, 0), *second)
    assert whole == pytest.approx(freedom(width, *first) + freedom(between + 1, *second), abs=1e-9)
