"""check_spec accepts what trace finds and refuses every broken spec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

from fedrebasin import InvalidSpecError, PermutationSpec, SpecMismatchError, check_spec, trace
from fedrebasin.layout import Fixed, Free, Layout, leaves
from fedrebasin.proof import Proof


@pytest.fixture(scope="module", params=list(networks.NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, PermutationSpec, Any]:
    net, inputs = networks.NETWORKS[request.param]()
    return net, trace(net, inputs), inputs


def test_a_traced_spec_passes_and_is_marked(case: tuple[nn.Module, PermutationSpec, Any]) -> None:
    net, spec, inputs = case
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert not spec.checked
    assert check_spec(net, spec, inputs).checked
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_densenet121_passes() -> None:
    net, inputs = networks.densenet121()
    assert check_spec(net, trace(net, inputs), inputs).checked


def test_swapping_two_units_of_any_axis_of_any_tensor_is_detected(
    case: tuple[nn.Module, PermutationSpec, Any],
) -> None:
    net, spec, inputs = case
    proof = Proof(net, spec, inputs, seed=0)
    for name, tensor in proof.state.items():
        used = name in spec.uses or any(proof.state[other] is tensor for other in spec.uses)
        for dim, size in enumerate(tensor.shape):
            if size > 1 and used and tensor.is_floating_point():
                order = torch.arange(size)
                order[[0, size // 2]] = order[[size // 2, 0]]  # a kernel's border may see nothing but padding
                swapped = {
                    key: value.index_select(dim, order) if value is tensor else value
                    for key, value in proof.state.items()
                }
                changes = [
                    (a - b).abs().max() / b.abs().max() for a, b in zip(proof.run(swapped), proof.outputs, strict=True)
                ]
                assert max(changes) > proof.tolerance, f"{name} dim {dim}"


def _fix(spec: PermutationSpec, name: str, dim: int) -> PermutationSpec:
    layouts = list(spec.axes[name])
    layouts[dim] = Fixed(layouts[dim].size, "by hand")
    return replace(spec, axes={**spec.axes, name: tuple(layouts)})


def test_leaving_any_tied_axis_out_is_refused_by_name(case: tuple[nn.Module, PermutationSpec, Any]) -> None:
    net, spec, inputs = case
    ties = [axis for axes in spec.tied.values() for axis in axes if len(axes) > 1]
    for axis in ties[:: max(1, len(ties) // 4)]:
        if any(isinstance(leaf, Free) and leaf.over for leaf in leaves(spec.axes[axis.name][axis.dim])):
            continue
        with pytest.raises(InvalidSpecError, match="changes an output by"):
            check_spec(net, _fix(spec, axis.name, axis.dim), inputs)


def test_the_message_names_the_tensor_and_the_op() -> None:
    net, inputs = networks.mlp()
    with pytest.raises(InvalidSpecError, match=r"leaves out '3.weight' dim 1, used by linear in 3"):
        check_spec(net, _fix(trace(net, inputs), "3.weight", 1), inputs)


def test_a_perm_too_many_is_refused_by_name() -> None:
    net, inputs = networks.mlp()
    spec = trace(net, inputs)
    layouts: tuple[Layout, ...] = (Free("extra", 3), spec.axes["7.weight"][1])
    with pytest.raises(InvalidSpecError, match=r"'extra' alone changes .* wrongly ties '7.weight' dim 0"):
        check_spec(net, replace(spec, axes={**spec.axes, "7.weight": layouts}), inputs)


def test_an_output_that_becomes_nan_counts_as_changed_without_bound() -> None:
    net, inputs = networks.mlp()
    proof = Proof(net, trace(net, inputs), inputs, seed=0)
    broken = {name: tensor * torch.nan if name == "3.bias" else tensor for name, tensor in proof.state.items()}
    assert proof.change_to(broken) == float("inf")


def test_a_spec_of_another_architecture_is_refused() -> None:
    net, inputs = networks.mlp()
    other, other_inputs = networks.NETWORKS["conv"]()
    with pytest.raises(SpecMismatchError, match="use the spec of this architecture"):
        check_spec(net, trace(other, other_inputs), inputs)


def test_a_saved_spec_keeps_its_mark_and_a_hand_edit_clears_it(tmp_path: Path) -> None:
    net, inputs = networks.NETWORKS["grouped"]()
    spec = check_spec(net, trace(net, inputs), inputs)
    path = tmp_path / "spec.json"
    spec.save(path)
    assert PermutationSpec.load(path) == spec
    path.write_text(path.read_text().replace('"size": 5', '"size": 6'))
    assert not PermutationSpec.load(path).checked


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", '{"format": "other"}', '{"format": "fedrebasin-spec-1", "axes": {"w": [{}]}}'),
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="spec: "):
        PermutationSpec.load(path)


class Clicks(nn.Module):
    """Looks categories up that come as floating numbers beside others, as click models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, 3)`` to ``(batch, 1)``; the first column is a category."""
        out: Tensor = self.head(torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1))
        return out


def test_categories_in_floating_inputs_are_kept() -> None:
    net, inputs = Clicks(), (torch.cat([torch.arange(40.0).unsqueeze(1) % 10, torch.rand(40, 2)], 1),)
    spec = check_spec(net, trace(net, inputs), inputs)
    assert spec.checked and spec.perm_shapes == {"table.weight:1": (4,), "head.0": (8,)}
    with pytest.raises(InvalidSpecError, match=r"leaves out 'head.2.weight' dim 1"):
        check_spec(net, _fix(spec, "head.2.weight", 1), inputs)
    with pytest.raises(InvalidSpecError, match=r"expected to run on random weights .* index out of range"):
        check_spec(net, spec, (torch.full((40, 3), 10.0),))


def test_a_mask_that_overflows_in_double_precision_is_proved_in_single() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.two(self.one(x).tanh())
            return (scores + torch.zeros(3) * torch.finfo(scores.dtype).min).softmax(-1)

    net, inputs = Masked(), (torch.zeros(2, 4),)
    spec = trace(net, inputs)
    proof = Proof(net, spec, inputs, seed=0)
    assert proof.state["one.weight"].dtype == torch.float32 and check_spec(net, spec, inputs).checked
    with pytest.raises(InvalidSpecError, match=r"leaves out 'two.weight' dim 1"):
        check_spec(net, _fix(spec, "two.weight", 1), inputs)


@pytest.mark.parametrize("width", [2, 3])
def test_two_permutations_of_few_units_that_belong_together_do_not_hide_each_other(width: int) -> None:
    net, inputs = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)), (torch.randn(5, 4),)
    spec = trace(net, inputs)
    assert check_spec(net, spec, inputs).checked
    apart = {**spec.axes, "2.weight": (spec.axes["2.weight"][0], Free("alone", width))}
    with pytest.raises(InvalidSpecError, match="alone changes an output"):
        for seed in range(3):
            check_spec(net, replace(spec, axes=apart), inputs, seed=seed)


def test_inputs_that_hide_all_that_is_permuted_are_told_of() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            hidden: Tensor = self.two(self.one(x).relu() * mask.unsqueeze(1))
            return hidden

    net, shown, hidden = Masked(), torch.ones(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    spec = trace(net, (torch.zeros(2, 4), shown))
    for inputs in ((torch.zeros(2, 4), hidden), (torch.zeros(0, 4), shown[:0])):
        [note] = check_spec(net, spec, inputs).notes
        assert "the proof has seen nothing" in note
        assert check_spec(net, replace(spec, notes=(note,)), (torch.zeros(2, 4), shown)).notes == ()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_cast_to_a_narrow_type_is_named_and_a_cast_to_the_weights_own_is_proved(narrow: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self, dtype: torch.dtype | None) -> None:
            super().__init__()
            self.first, self.last, self.dtype = nn.Linear(4, 6).to(narrow), nn.Linear(6, 2).to(narrow), dtype

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.first(x.to(self.dtype or self.first.weight.dtype)).relu())
            return found

    inputs = (torch.randn(3, 4),)
    spec = trace(Net(narrow), inputs)
    with pytest.raises(InvalidSpecError, match=rf"where forward casts to {narrow}, let it cast to the weights' own"):
        check_spec(Net(narrow), spec, inputs)
    assert check_spec(Net(None), spec, inputs).perm_shapes == {"first": (6,)}
