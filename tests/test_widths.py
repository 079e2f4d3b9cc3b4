"""Networks of different widths: dead, doubled and split units are found, and the merge has the same function."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fedrebasin import (
    InvalidSpecError,
    PermutationSpec,
    RebasinError,
    SpecMismatchError,
    check_widths,
    match_widths,
    merge_widths,
    resize,
    trace,
)
from fedrebasin.simulations.models import build_model
from fedrebasin.widths.maps import WidthMatching, common_units

State = dict[str, Tensor]
X = (torch.zeros(3, 5),)
IMAGE = (torch.zeros(2, 3, 16, 16),)


def mlp(first: int, second: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, first), nn.Tanh(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 4)]
    return nn.Sequential(*layers)


def spec_of(net: nn.Module, inputs: tuple[Tensor, ...] = X) -> PermutationSpec:
    return trace(net, inputs)


def widened(state: State, sources: dict[str, list[int]], shares: dict[str, list[float]]) -> State:
    """By hand: hidden unit i of layer k is a copy of ``sources[k][i]``, read by that share; -1 is a dead unit."""
    wide = {name: tensor.double() for name, tensor in state.items()}
    for layer, after in (("0", "2"), ("2", "4")):
        rows, columns, biases = [], [], []
        for source, share in zip(sources[layer], shares[layer], strict=True):
            alive = source >= 0
            rows.append(wide[f"{layer}.weight"][source] * alive)
            biases.append(wide[f"{layer}.bias"][source] * alive)
            columns.append(wide[f"{after}.weight"][:, source] * share * alive)
        wide[f"{layer}.weight"], wide[f"{layer}.bias"] = torch.stack(rows), torch.stack(biases)
        wide[f"{after}.weight"] = torch.stack(columns, 1)
    return wide


def output(state: State, x: Tensor) -> Tensor:
    net = mlp(len(state["0.bias"]), len(state["2.bias"])).double()
    net.load_state_dict(state)
    return net(x)


#: sources and shares of two hidden layers of 3 and 4 units
PLANTED = {
    "dead units": ({"0": [2, -1, 0, -1, 1], "2": [-1, 3, 1, 0, -1, 2, -1]}, {"0": [1] * 5, "2": [1] * 7}),
    "doubled units": (
        {"0": [1, 0, 1, 2], "2": [3, 2, 0, 1, 2, 0]},
        {"0": [0.5, 1, 0.5, 1], "2": [1, 0.5, 0.5, 1, 0.5, 0.5]},
    ),
    "split units": (
        {"0": [1, 1, 2, 0, 1], "2": [0, 2, 3, 1, 0]},
        {"0": [0.2, 0.5, 1, 1, 0.3], "2": [0.7, 1, 1, 1, 0.3]},
    ),
    "all of it": (
        {"0": [-1, 2, 1, 0, 2], "2": [3, 1, -1, 0, 2, 1]},
        {"0": [1, 0.4, 1, 1, 0.6], "2": [1, 0.9, 1, 1, 1, 0.1]},
    ),
}


def planted(kind: str) -> tuple[list[PermutationSpec], list[State]]:
    narrow = mlp(3, 4)
    wide = widened(narrow.state_dict(), *PLANTED[kind])
    nets = [mlp(len(wide["0.bias"]), len(wide["2.bias"])), narrow]
    return [spec_of(net) for net in nets], [wide, {k: v.double() for k, v in narrow.state_dict().items()}]


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
    state = _alive(nets[1])
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


def _alive(net: nn.Module) -> State:
    """Random weights, norms and statistics, so that units differ."""
    generator, state = torch.Generator().manual_seed(1), {}
    for name, tensor in net.state_dict().items():
        state[name] = tensor
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            state[name] = tensor.double() + 0.1 * drawn if tensor.ndim > 1 else 1 + 0.3 * drawn.tanh()
    return state


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


def test_a_dead_unit_stays_dead_behind_a_norm_and_the_proof_sees_what_looks_at_all_units() -> None:
    nets = [build_model("conv", (3, 16, 16), 3, width=width) for width in (9, 6)]
    assert all(spec.checked for spec in check_widths(*nets, IMAGE))
    specs = [trace(net, IMAGE) for net in nets]
    placed = resize(match_widths(*specs, nets[0].state_dict(), nets[1].state_dict()), nets[1].state_dict())
    dead = placed["1.weight"] == 0
    assert dead.sum() == 3
    assert placed["1.running_var"][dead].tolist() == [1, 1, 1]
    assert not placed["1.bias"][dead].any() and not placed["1.running_mean"][dead].any()
    with pytest.raises(InvalidSpecError, match="looks at all units at once"):
        check_widths(*(build_model("conv", (3, 16, 16), 3, width=width, norm="layer") for width in (9, 6)), IMAGE)
    with pytest.raises(SpecMismatchError, match="narrow: expected at most 6 units"):
        check_widths(*nets[::-1], IMAGE)


def test_what_cannot_be_matched_is_refused_with_the_way_out() -> None:
    nets = [mlp(5, 6), mlp(3, 4)]
    specs, states = [spec_of(net) for net in nets], [net.state_dict() for net in nets]
    with pytest.raises(RebasinError, match="unmatched: expected one of 'pad', 'fold', 'transport'; got 'drop'"):
        match_widths(*specs, *states, unmatched="drop")
    with pytest.raises(SpecMismatchError, match=r"reference: expected '0.weight' as \(5, 5\); got \(3, 5\)"):
        match_widths(*specs, *states[::-1])
    with pytest.raises(SpecMismatchError, match=r"model: expected finite weights; '0.bias'"):
        match_widths(*specs, states[0], {**states[1], "0.bias": torch.full((3,), torch.nan)})
    other = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 7))
    with pytest.raises(SpecMismatchError, match=r"axis 0 of '4.weight' .* got 4 and 7"):
        match_widths(specs[0], spec_of(other), states[0], other.state_dict())
    with pytest.raises(SpecMismatchError, match=r"networks of one kind; '4.bias' is in one only"):
        match_widths(specs[0], spec_of(nn.Sequential(*list(other)[:4])), states[0], states[1])
    with pytest.raises(RebasinError, match="specs: expected one for each model; got 1 for 2"):
        merge_widths(specs[:1], states)
    lstms = [nn.LSTM(4, n) for n in (6, 5)]
    with pytest.raises(RebasinError, match=r"'fold' needs to know which axis of '.*' is read.* take unmatched='pad'"):
        match_widths(*(trace(net, (torch.zeros(2, 3, 4),)) for net in [Wrapped(net) for net in lstms]),
                     *(Wrapped(net).state_dict() for net in lstms), unmatched="fold")  # fmt: skip
    big = [nn.Sequential(nn.Linear(5, n), nn.Linear(n, 2)) for n in (67, 71)]
    with pytest.raises(RebasinError, match="67 and 71 units make 4757 copies, over 4096"):
        match_widths(*(spec_of(net) for net in big), *(net.state_dict() for net in big), unmatched="transport")


class Wrapped(nn.Module):
    """An LSTM whose states do not leave."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm, self.out = lstm, nn.Linear(lstm.hidden_size, 2)
        torch.nn.init.ones_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])
