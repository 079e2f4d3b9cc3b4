"""A spec can be read, edited by hand, cut down to some tensors, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import networks_attention
import pytest
import torch
from torch import nn

from fedrebasin import (
    PermutationSpec,
    RebasinError,
    SpecMismatchError,
    check_spec,
    permute,
    random_perms,
    trace,
    weight_matching,
)
from fedrebasin.layout import Each, Fixed, Free, Product, has_leaf, units
from fedrebasin.layout_text import describe, from_json, to_json
from fedrebasin.permute import source

ATTENTION = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
TOKENS = (torch.zeros(2, 3, 8),)
QKV = Product((Fixed(2, "parts", "two"), Each("two", (Free("a", 3), Free("b", 3)))))


def test_heads_and_the_dims_within_each_head_are_named_by_their_module() -> None:
    spec = trace(ATTENTION, TOKENS)
    assert spec.perm_shapes["self_attn"] == (2,)
    assert spec.over == {"self_attn#2": "self_attn", "self_attn#3": "self_attn"}
    assert describe(spec.axes["self_attn.in_proj_weight"][0]) == (
        "self_attn[2] x self_attn#2[4] in each of self_attn + self_attn[2] x self_attn#2[4] in each of self_attn"
        " + self_attn[2] x self_attn#3[4] in each of self_attn"
    )


def test_the_printed_spec_says_what_is_tied_and_what_is_fixed_and_why() -> None:
    text = str(trace(ATTENTION, TOKENS))
    assert "self_attn#2 (2 x 4): self_attn.in_proj_weight:0, self_attn.in_proj_bias:0" in text
    assert "input" in text and "checked: no" in text


def test_an_each_follows_the_index_of_its_outer_leaf() -> None:
    perms = {"a": torch.tensor([1, 2, 0]), "b": torch.tensor([2, 1, 0])}
    assert source(QKV, perms, {}).tolist() == [1, 2, 0, 5, 4, 3]
    assert units(QKV, "b").tolist() == [-1, -1, -1, 0, 1, 2]
    assert from_json(json.loads(json.dumps(to_json(QKV)))) == QKV


def test_interleaved_parts_are_permuted_each_by_its_own() -> None:
    shuffled = Product((Each("two", (Free("a", 2), Free("b", 2))), Fixed(2, "parts", "two")))
    perms = {"a": torch.tensor([1, 0]), "b": torch.tensor([0, 1])}
    assert source(shuffled, perms, {}).tolist() == [2, 1, 0, 3]


def test_fixing_a_perm_keeps_the_mark_and_the_function() -> None:
    spec = check_spec(ATTENTION, trace(ATTENTION, TOKENS), TOKENS)
    for perm in spec.perm_shapes:
        fewer = spec.fix(perm)
        assert perm not in fewer.perm_shapes and fewer.checked
        assert check_spec(ATTENTION, fewer, TOKENS).log10_order < spec.log10_order
    assert "heads have roles" in str(spec.fix("self_attn", reason="heads have roles"))


def test_renaming_a_perm_renames_its_families_outer_axis() -> None:
    spec = trace(ATTENTION, TOKENS).rename({"self_attn": "heads", "self_attn#2": "query-key"})
    assert spec.over == {"query-key": "heads", "self_attn#3": "heads"}
    assert check_spec(ATTENTION, spec, TOKENS).checked


@pytest.mark.parametrize("change", [lambda spec: spec.fix("nothing"), lambda spec: spec.rename({"nothing": "x"})])
def test_unknown_perms_are_refused(change: object) -> None:
    with pytest.raises(RebasinError, match=r"perms: expected some of .* got 'nothing'"):
        change(trace(ATTENTION, TOKENS))  # type: ignore[operator]


def test_two_perms_cannot_get_one_name() -> None:
    with pytest.raises(RebasinError, match="names: expected a name of its own for each permutation"):
        trace(ATTENTION, TOKENS).rename({"self_attn": "linear1"})


def test_what_is_tied_to_a_tensor_that_stays_at_home_is_fixed() -> None:
    net, inputs = networks.NETWORKS["conv"]()
    spec = check_spec(net, trace(net, inputs), inputs)
    travelling = [name for name in spec.axes if not name.startswith("1.")]  # the first BatchNorm stays, as in FedBN
    part = spec.only(travelling)
    assert set(spec.perm_shapes) - set(part.perm_shapes) == {"0"}
    assert "tied to '1.weight', which does not travel" in str(part) and part.checked
    state = {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in net.state_dict().items()
    }
    moved = permute(part, random_perms(part, 1), {name: state[name] for name in travelling})
    x = torch.randn(inputs[0].shape)
    net.eval()
    before = torch.func.functional_call(net, state, (x,))
    after = torch.func.functional_call(net, {**state, **moved}, (x,))
    assert any(not torch.equal(moved[name], state[name]) for name in travelling)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_tensor_that_the_model_lacks_cannot_travel() -> None:
    with pytest.raises(RebasinError, match="tensors: expected names of this spec's tensors; got 'adapter'"):
        trace(ATTENTION, TOKENS).only(["adapter"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrappers_prefix_is_named(prefix: str) -> None:
    spec = trace(nn.Linear(3, 2), (torch.zeros(1, 3),))
    with pytest.raises(
        SpecMismatchError, match=rf"model: the names' prefix '{prefix}' \(.*; take the state dict of the"
    ):
        spec.check_state({f"{prefix}{name}": tensor for name, tensor in nn.Linear(3, 2).state_dict().items()})


def test_arrays_in_place_of_tensors_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    with pytest.raises(SpecMismatchError, match=r"expected '0.weight' as a tensor; got ndarray; use torch.as_tensor"):
        weight_matching(trace(net, (torch.zeros(2, 4),)), net.state_dict(), arrays)


def test_every_kind_of_layout_survives_json(tmp_path: Path) -> None:
    for make in networks_attention.ATTENTION.values():
        net, inputs, *_ = make()
        spec = trace(net, inputs)
        spec.save(tmp_path / "spec.json")
        assert PermutationSpec.load(tmp_path / "spec.json") == spec


def test_a_hand_edit_that_loses_an_outer_axis_is_refused(tmp_path: Path) -> None:
    data = trace(ATTENTION, TOKENS).to_json()
    data["axes"]["self_attn.out_proj.weight"][1] = {"perm": "self_attn#3", "size": 8, "over": "self_attn"}
    with pytest.raises(RebasinError, match="'self_attn#3' has 4 units on one axis and 8 on another"):
        PermutationSpec.from_json(data)
    data["axes"]["self_attn.out_proj.weight"][1] = {"perm": "new", "size": 8, "over": "self_attn"}
    with pytest.raises(RebasinError, match="depends on 'self_attn', which no axis of that tensor has"):
        PermutationSpec.from_json(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [("axes", {"w": 3}), ("buffers", 5), ("buffers", "w"), ("inputs", "x"), ("uses", [1]), ("notes", [["a"]])],
)
def test_a_hand_edit_that_gives_a_field_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RebasinError, match=f"spec: expected '{name}' as "):
        PermutationSpec.from_json({**trace(ATTENTION, TOKENS).to_json(), name: value})


@pytest.mark.parametrize("sizes", [[2], [2, 3], [2, 2, 2]])
def test_parts_that_do_not_fit_their_outer_leaf_are_refused(sizes: list[int]) -> None:
    parts = [{"perm": f"p{place}", "size": size} for place, size in enumerate(sizes)]
    axes = {"w": [{"fixed": "", "size": 2, "name": "h"}, {"product": [{"each": "h", "parts": parts}]}]}
    with pytest.raises(RebasinError, match="'w' needs parts of one size for the 2 indices of 'h'"):
        PermutationSpec.from_json({**trace(ATTENTION, TOKENS).to_json(), "axes": axes, "buffers": []})


def test_units_that_depend_on_a_leaf_do_not_hold_it() -> None:
    assert units(QKV.factors[1], "two").tolist() == [-1, -1, -1]
    assert has_leaf(QKV, "two")
