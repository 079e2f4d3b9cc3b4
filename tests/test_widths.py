"""Networks of different widths: dead, doubled and split units are found, and the merge has the same function."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from widths_cases import IMAGE, PLANTED, alive, mlp, output, planted, spec_of, widened

from fedrebasin import (
    match_widths,
    merge_widths,
    resize,
    trace,
)
from fedrebasin.simulations.models import build_model
from fedrebasin.widths.maps import WidthMatching, common_units

State = dict[str, Tensor]


@pytest.mark.parametrize("turn", [1, -1], ids=["wide first", "narrow first"])
@pytest.mark.parametrize("kind", PLANTED)
def test_a_network_with_units_added_merges_back_to_the_same_function_in_both_widths(kind: str, turn: int) -> None:
    specs, states = planted(kind)
    x = torch.randn(30, 5, dtype=torch.float64)
    expected = output(states[1], x)
    torch.testing.assert_close(output(states[0], x), expected)
    unmatched = "pad" if kind == "dead units" else "fold"
    merged = merge_widths(specs[::turn], states[::turn], coefficients=[0.3, 0.7], unmatched=unmatched)
    for state, own in zip(merged, states[::turn], strict=True):
        assert {name: tensor.shape for name, tensor in state.items()} == {k: v.shape for k, v in own.items()}
        torch.testing.assert_close(output(state, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("turn", [1, -1], ids=["narrow to wide", "wide to narrow"])
def test_either_network_made_to_fit_the_other_is_the_other(kind: str, turn: int) -> None:
    (one, other), (reference, model) = (pair[::turn] for pair in planted(kind))
    found = match_widths(one, other, reference, model, unmatched="fold")
    fitted = resize(found, model)
    for name, tensor in reference.items():
        torch.testing.assert_close(fitted[name], tensor, rtol=1e-10, atol=1e-10)


def test_transport_finds_a_network_each_of_whose_units_is_doubled() -> None:
    narrow = mlp(3, 4)
    sources = {"0": [2, 0, 1, 0, 2, 1], "2": [3, 1, 0, 2, 2, 3, 0, 1]}
    wide = widened(narrow.state_dict(), sources, {"0": [0.5] * 6, "2": [0.5] * 8})
    specs = [spec_of(mlp(6, 8)), spec_of(narrow)]
    states = [wide, {name: tensor.double() for name, tensor in narrow.state_dict().items()}]
    x = torch.randn(30, 5, dtype=torch.float64)
    for state in merge_widths(specs, states, unmatched="transport"):
        torch.testing.assert_close(output(state, x), output(states[1], x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["conv", "vgg", "resnet20"])
def test_convolutional_networks_with_dead_units_in_random_places_merge_back(name: str) -> None:
    """Residual streams, BatchNorm, a flattened image: all in float64."""
    sizes = {"conv": (12, 7), "vgg": (6, 4), "resnet20": (2, 1)}[name]
    nets = [build_model(name, (3, 16, 16), 3, width=width).eval() for width in sizes]
    specs = [trace(net, IMAGE) for net in nets]
    state = alive(nets[1])
    generator, maps = torch.Generator().manual_seed(0), {}
    for perm, other in common_units(*specs).items():
        units, fewer = specs[0].perm_shapes[perm][0], specs[1].perm_shapes[other][0]
        maps[perm] = torch.zeros(units, fewer, dtype=torch.float64)
        maps[perm][torch.randperm(units, generator=generator)[:fewer], torch.arange(fewer)] = 1.0
    wide = resize(WidthMatching(*specs, maps, maps), state)
    found = match_widths(*specs, wide, state)
    assert all(torch.equal(found.writes[perm], matrix) for perm, matrix in maps.items())
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    nets = [net.double() for net in nets]
    nets[1].load_state_dict(state)
    expected = nets[1](x)
    for net, merged in zip(nets, merge_widths(specs, [wide, state], coefficients=[2, 1]), strict=True):
        net.load_state_dict(merged)
        torch.testing.assert_close(net(x), expected, rtol=1e-8, atol=1e-8)


def test_one_layers_matching_is_the_best_of_all_placements() -> None:
    for seed in range(5):
        nets = [nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, 2)).double() for n in (5, 3)]
        generator = torch.Generator().manual_seed(seed)
        states = [{k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in n.state_dict().items()}
                  for n in nets]  # fmt: skip
        specs = [trace(net.float(), (torch.zeros(2, 3),)) for net in nets]
        found = match_widths(*specs, *states)

        def score(units: tuple[int, ...], states: list[State] = states) -> float:
            wide, narrow = states
            places = list(units)
            kept = [wide["0.weight"][places], wide["0.bias"][places], wide["2.weight"][:, places]]
            return sum(
                float((a * b).sum())
                for a, b in zip(kept, [narrow["0.weight"], narrow["0.bias"], narrow["2.weight"]], strict=True)
            )

        best = max(score(units) for units in itertools.permutations(range(5), 3))
        assert found.objective == pytest.approx(best)
        assert found.present["0"].sum() == 3


def test_an_entry_is_averaged_over_the_models_that_have_its_units() -> None:
    weight = torch.tensor
    wide = {"0.weight": weight([[1.0], [4.0], [-9.0]]), "0.bias": torch.zeros(3), "1.weight": weight([[1.0, 6.0, 2.0]])}
    narrow = {"0.weight": weight([[-7.0], [2.0]]), "0.bias": torch.ones(2), "1.weight": weight([[4.0, 2.0]])}
    nets = [nn.Sequential(nn.Linear(1, n), nn.Linear(n, 1, bias=False)) for n in (3, 2)]
    specs = [trace(net, (torch.zeros(2, 1),)) for net in nets]
    merged, back = merge_widths(specs, [wide, narrow], coefficients=[0.75, 0.25])
    assert merged["0.weight"].flatten().tolist() == [1.0, 3.5, -8.5]  # the narrow one lacks the first
    assert merged["0.bias"].tolist() == [0.0, 0.25, 0.25]
    assert merged["1.weight"].flatten().tolist() == [1.0, 5.0, 2.5]
    assert [back[name].flatten().tolist() for name in narrow] == [[-8.5, 3.5], [0.25, 0.25], [2.5, 5.0]]


def test_networks_of_one_width_are_simply_aligned_and_dtypes_and_counters_stay() -> None:
    nets = [build_model("conv", (3, 16, 16), 3, width=6).eval() for _ in range(2)]
    spec = trace(nets[0], IMAGE)
    states = [{k: v.half() if v.is_floating_point() else v + 7 * place for k, v in net.state_dict().items()}
              for place, net in enumerate(nets)]  # fmt: skip
    for place, merged in enumerate(merge_widths([spec, spec], states)):
        assert list(merged) == list(states[place])
        assert all(merged[name].dtype == tensor.dtype for name, tensor in states[place].items())
        assert int(merged["1.num_batches_tracked"]) == 7 * place
