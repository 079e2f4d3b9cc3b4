"""Redundant units of one network are merged: doubled, split, dead and scaled units leave its function as it is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from widths_cases import IMAGE, PLANTED, alive, mlp, output, planted, spec_of

from fedrebasin import RebasinError, merge_units, resize, trace
from fedrebasin.simulations.models import build_model
from fedrebasin.widths.maps import WidthMatching
from fedrebasin.widths.resized import with_units
from fedrebasin.widths.within import _ward


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_redundant_units_are_merged_and_the_function_stays(kind: str) -> None:
    (spec, _), (wide, narrow) = planted(kind)
    found = merge_units(spec, wide, {"0": 3, "2": 4})
    assert found.units == {"0": 3, "2": 4}
    x = torch.randn(30, 5, dtype=torch.float64)
    torch.testing.assert_close(output(found.state, x), output(narrow, x))
    (matching,) = found.matchings
    torch.testing.assert_close(resize(matching, wide), found.state)
    assert merge_units(spec, wide, 100).units == {perm: shape[0] for perm, shape in spec.perm_shapes.items()}


def test_convolutions_with_doubled_channels_and_their_norms_merge_back() -> None:
    net = build_model("conv", (3, 16, 16), 3, width=4).eval()
    spec, state = trace(net, IMAGE), alive(net)
    twice = torch.eye(4, dtype=torch.float64).repeat(2, 1)[torch.randperm(8)]
    wide = with_units(spec, dict.fromkeys(spec.perm_shapes, 8))
    writes, reads = (dict.fromkeys(spec.perm_shapes, matrix) for matrix in (twice, twice / 2))
    doubled = resize(WidthMatching(wide, spec, writes, reads), state)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = functional_call(net.double(), state, x)
    torch.testing.assert_close(functional_call(net, doubled, x), expected)
    torch.testing.assert_close(functional_call(net, merge_units(wide, doubled, 4).state, x), expected)


def test_behind_relu_scaled_and_silent_units_cost_nothing_and_behind_tanh_they_do() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4)).double()
    state = net.state_dict()
    scales = torch.tensor([1, 2.0, 0.3, 1, 5, 0, 1], dtype=torch.float64)
    source = torch.tensor([0, 0, 1, 1, 2, 0, 2])
    wide = {
        "0.weight": state["0.weight"][source] * scales[:, None],
        "0.bias": state["0.bias"][source] * scales,
        "2.weight": torch.randn(4, 7, dtype=torch.float64),
        "2.bias": state["2.bias"],
    }
    spec = trace(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)), (torch.zeros(2, 5),))
    x = torch.randn(30, 5, dtype=torch.float64)
    expected = functional_call(net, wide, x)
    found = merge_units(spec, wide, 3, homogeneous=True)
    torch.testing.assert_close(functional_call(net, found.state, x), expected)
    plain = functional_call(net, merge_units(spec, wide, 3).state, x)
    assert (plain - expected).norm() > 0.1 * expected.norm()


def test_the_first_merger_is_the_one_that_costs_least() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        mass = torch.randn(5, generator=generator, dtype=torch.float64).mul(2).exp()
        groups = _ward(points, mass, 4).tolist()
        together = next(pair for pair in itertools.combinations(range(5), 2) if groups[pair[0]] == groups[pair[1]])

        def cost(pair: tuple[int, int], points: torch.Tensor = points, mass: torch.Tensor = mass) -> float:
            own, weight = points[list(pair)], mass[list(pair)]
            mean = (weight[:, None] * own).sum(0) / weight.sum()
            return float((weight * (own - mean).square().sum(1)).sum())

        assert together == min(itertools.combinations(range(5), 2), key=cost)


def test_a_group_is_written_by_the_least_squares_mean_and_read_by_the_sum() -> None:
    spec = trace(nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)), (torch.zeros(2, 1),))
    state = {"0.weight": torch.tensor([[1.0], [2.0], [-9.0]]), "1.weight": torch.tensor([[3.0, 1.0, 7.0]])}
    found = merge_units(spec, state, 2).state
    assert found["0.weight"].flatten().tolist() == pytest.approx([(9 * 1 + 1 * 2) / 10, -9])
    assert found["1.weight"].flatten().tolist() == [4, 7]


def test_what_cannot_be_merged_is_refused() -> None:
    net = mlp(4, 3)
    with pytest.raises(RebasinError, match=r"units: expected positive widths of some of \['0', '2'\] ...; got '1': 2"):
        merge_units(spec_of(net), net.state_dict(), {"1": 2})
    with pytest.raises(RebasinError, match="got '0': 0"):
        merge_units(spec_of(net), net.state_dict(), 0)
    conv = build_model("conv", (3, 16, 16), 3, width=4)
    with pytest.raises(RebasinError, match=r"homogeneous: expected no norm on the units of '0'; '1.weight' is used by"):
        merge_units(trace(conv, IMAGE), conv.state_dict(), 2, homogeneous=True)
    layer = build_model("conv", (3, 16, 16), 3, width=4, norm="layer")
    with pytest.raises(RebasinError, match="looks at all units at once"):
        merge_units(trace(layer, IMAGE), layer.state_dict(), 2)
