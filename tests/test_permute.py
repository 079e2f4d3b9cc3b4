"""Permuting, inverting and composing: the function stays, bits come back, dtypes are kept."""

from __future__ import annotations

from collections import OrderedDict

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedrebasin import (
    PermutationSpec,
    SpecMismatchError,
    compose,
    identity_perms,
    invert,
    moved_fraction,
    permute,
    random_perms,
    trace,
)

GROUPED = trace(networks.Grouped(), networks.IMAGE)
DENSE = trace(networks.DenseBlock(), networks.IMAGE)


def _state(spec: PermutationSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", list(networks.NETWORKS))
def test_permuting_hidden_units_leaves_outputs_unchanged(name: str) -> None:
    net, inputs = networks.NETWORKS[name]()
    spec = trace(net, inputs)
    net = net.double().eval()
    batch = {k: torch.randn_like(v).double() for k, v in inputs.items()} if isinstance(inputs, dict) else None
    args = () if batch else tuple(torch.randn_like(x).double() for x in inputs)
    before = net(*args, **(batch or {}))
    net.load_state_dict(permute(spec, random_perms(spec, 3), net.state_dict()))
    after = net(*args, **(batch or {}))
    for key in before if isinstance(before, dict) else [slice(None)]:
        torch.testing.assert_close(after[key], before[key], rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["grouped", "dense"]))
def test_perms_applied_and_inverted_give_back_the_exact_bits(seed: int, which: str) -> None:
    spec = GROUPED if which == "grouped" else DENSE
    state, perms = _state(spec), random_perms(spec, seed)
    assert _equal(permute(spec, invert(spec, perms), permute(spec, perms, state)), state)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.sampled_from(["grouped", "dense"]))
def test_composed_perms_act_like_one_after_the_other(first: int, second: int, which: str) -> None:
    spec = GROUPED if which == "grouped" else DENSE
    state = _state(spec)
    one, two = random_perms(spec, first), random_perms(spec, second)
    stepwise = permute(spec, two, permute(spec, one, state))
    assert _equal(permute(spec, compose(spec, one, two), state), stepwise)


def test_the_identity_changes_no_bit_and_shares_no_memory() -> None:
    state = _state(DENSE)
    same = permute(DENSE, identity_perms(DENSE), state)
    assert _equal(same, state)
    assert all(same[name].data_ptr() != state[name].data_ptr() for name in state if state[name].numel())


def test_dtypes_key_order_and_metadata_are_kept() -> None:
    net, inputs = networks.NETWORKS["conv"]()
    spec = trace(net, inputs)
    state = net.half().state_dict()
    reordered = OrderedDict(reversed(state.items()))
    reordered._metadata = state._metadata  # type: ignore[attr-defined]
    moved = permute(spec, random_perms(spec, 1), reordered)
    assert list(moved) == list(reordered)
    assert [tensor.dtype for tensor in moved.values()] == [tensor.dtype for tensor in reordered.values()]
    assert moved["1.num_batches_tracked"].dtype == torch.int64
    assert moved._metadata == state._metadata  # type: ignore[attr-defined]


def test_inputs_are_never_edited() -> None:
    state = _state(GROUPED)
    before = {name: tensor.clone() for name, tensor in state.items()}
    permute(GROUPED, random_perms(GROUPED, 5), state)
    assert _equal(state, before)


def test_moved_fraction_counts_units_of_all_perms() -> None:
    assert moved_fraction({"a": torch.tensor([0, 1]), "b": torch.tensor([1, 0])}) == 0.5
    assert moved_fraction({}) == 0.0


@pytest.mark.parametrize(
    ("perms", "message"),
    [
        ({}, "expected exactly the spec's 1 perms; '0' is in one only"),
        ({"0": torch.tensor([0, 1])}, r"expected '0' as int64 of shape \(3,\); got torch.int64 of shape \(2,\)"),
        ({"0": torch.tensor([0.0, 1, 2])}, "got torch.float32"),
        ({"0": torch.tensor([0, 1, 1])}, "'0' is not a permutation"),
    ],
)
def test_perms_that_do_not_fit_are_refused(perms: dict[str, Tensor], message: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    spec = trace(net, (torch.zeros(1, 2),))
    with pytest.raises(SpecMismatchError, match=message):
        permute(spec, perms, net.state_dict())


def test_a_state_dict_that_does_not_fit_is_refused_by_tensor() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    spec, state = trace(net, (torch.zeros(1, 2),)), net.state_dict()
    perms = identity_perms(spec)
    with pytest.raises(SpecMismatchError, match=r"expected '0.weight' as \(3, 2\); got \(3, 3\)"):
        permute(spec, perms, {**state, "0.weight": torch.zeros(3, 3)})
    with pytest.raises(SpecMismatchError, match=r"has a tensor '2.bias' that the state dict lacks"):
        permute(spec, perms, {name: tensor for name, tensor in state.items() if name != "2.bias"})
    with pytest.raises(SpecMismatchError, match="has a tensor 'more' that the spec lacks"):
        permute(spec, perms, {**state, "more": torch.zeros(1)})
