"""Matched averaging that grows the global model: copies grow nothing, strangers give their ensemble, extras count."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from widths_cases import IMAGE, alive, mlp, spec_of

from fedrebasin import (
    RebasinError,
    SpecMismatchError,
    check_spec,
    matched_averaging,
    permute,
    random_perms,
    resize,
    trace,
)
from fedrebasin.simulations.models import build_model
from fedrebasin.widths.some import match_some

State = dict[str, Tensor]
SHARES = [0.2, 0.5, 0.3]


def doubled(net: nn.Module) -> State:
    return {k: v.double() if v.is_floating_point() else v for k, v in net.state_dict().items()}


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1, 2])
def test_permuted_copies_grow_nothing_and_give_the_heaviest_ones_weights(threshold: float) -> None:
    net = mlp(7, 6)
    spec, state = spec_of(net), doubled(net)
    copies = [permute(spec, random_perms(spec, seed), state) for seed in range(3)]
    grown = matched_averaging([spec] * 3, copies, coefficients=SHARES, threshold=threshold)
    assert grown.units == {"0": 7, "2": 6}
    for name, tensor in copies[1].items():
        torch.testing.assert_close(grown.state[name], tensor)


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet20"])
def test_models_that_share_no_unit_give_exactly_the_weighted_mean_of_their_outputs(name: str) -> None:
    """Residual streams, BatchNorm and a flattened image; three models of three widths."""
    shape = (3, 16, 16)
    widths = (2, 1, 1) if name == "resnet20" else (5, 3, 4)
    nets = [build_model(name, shape, 4, width=width).eval() for width in widths]
    specs = [trace(net, IMAGE) for net in nets]
    states = [alive(net, seed=seed) for seed, net in enumerate(nets)]
    grown = matched_averaging(specs, states, coefficients=SHARES, threshold=0)
    for perm, count in grown.units.items():
        assert count == sum(spec.perm_shapes[perm][0] for spec in specs)
    x = torch.randn(3, *shape, dtype=torch.float64)
    expected = sum(
        share * functional_call(net.double(), state, x) for share, net, state in zip(SHARES, nets, states, strict=True)
    )
    torch.testing.assert_close(functional_call(nets[0], grown.state, x), expected)
    grown.spec.check_state(grown.state)


def test_extra_units_become_global_units_and_count_by_their_clients_share() -> None:
    """A client is the permuted global model and two units more in each layer, whose outputs nobody else reads."""
    base = mlp(5, 4)
    state = doubled(base)
    torch.manual_seed(1)
    wide = {
        "0.weight": torch.cat([state["0.weight"], torch.randn(2, 5, dtype=torch.float64)]),
        "0.bias": torch.cat([state["0.bias"], torch.randn(2, dtype=torch.float64)]),
        "2.weight": torch.randn(6, 7, dtype=torch.float64),
        "2.bias": torch.cat([state["2.bias"], torch.randn(2, dtype=torch.float64)]),
        "4.weight": torch.cat([state["4.weight"], torch.randn(4, 2, dtype=torch.float64)], 1),
        "4.bias": state["4.bias"],
    }
    wide["2.weight"][:4] = torch.cat([state["2.weight"], torch.zeros(4, 2)], 1)
    specs = [spec_of(base), spec_of(mlp(7, 6))]
    moved = permute(specs[1], random_perms(specs[1], 3), wide)
    x = torch.randn(9, 5, dtype=torch.float64)
    outputs = [functional_call(base.double(), one, x) for one in (state, moved)]
    for shares, turn in (([0.7, 0.3], 1), ([0.4, 0.6], -1)):
        grown = matched_averaging(specs[::turn], [state, moved][::turn], coefficients=shares[::turn])
        assert grown.units == {"0": 7, "2": 6}
        torch.testing.assert_close(
            functional_call(base, grown.state, x), shares[0] * outputs[0] + shares[1] * outputs[1]
        )
        for matching, one in zip(grown.matchings, [state, moved][::turn], strict=True):
            torch.testing.assert_close(functional_call(base, resize(matching, one), x), functional_call(base, one, x))
    narrow = resize(grown.matchings[1].inverse(), grown.state)
    torch.testing.assert_close(narrow, state)  # the global model in the narrow client's width is the client


def test_the_grown_spec_belongs_to_a_module_of_its_widths() -> None:
    nets = [mlp(5, 4, seed) for seed in range(2)]
    grown = matched_averaging([spec_of(net) for net in nets], [net.state_dict() for net in nets], threshold=1)
    assert not grown.spec.checked
    module = mlp(grown.units["0"], grown.units["2"])
    assert spec_of(module).axes == grown.spec.axes
    module.load_state_dict(grown.state)
    assert check_spec(module, grown.spec, (torch.zeros(3, 5),)).checked
    assert {tensor.dtype for tensor in grown.state.values()} == {torch.float32}


def test_a_larger_threshold_grows_less_and_a_model_without_weight_nothing() -> None:
    nets = [mlp(8, 8, seed) for seed in range(3)]
    specs, states = [spec_of(net) for net in nets], [net.state_dict() for net in nets]
    units = [sum(matched_averaging(specs, states, threshold=t).units.values()) for t in (0, 0.5, 1, 2)]
    assert units[0] == 48 and units[3] == 16
    assert sorted(units, reverse=True) == units
    assert units[1] > units[2] > 16
    assert matched_averaging(specs, states, coefficients=[0, 1, 0], threshold=0).units == {"0": 8, "2": 8}


def test_one_layers_pairs_are_the_best_of_all_choices_of_pairs() -> None:
    for seed, threshold in itertools.product(range(4), (0.4, 0.9, 1.3)):
        generator = torch.Generator().manual_seed(seed)
        nets = [nn.Sequential(nn.Linear(2, n), nn.ReLU(), nn.Linear(n, 1)) for n in (4, 3)]
        states = [
            {k: torch.randn(v.shape, generator=generator).double() for k, v in net.state_dict().items()} for net in nets
        ]
        specs = [trace(net, (torch.zeros(2, 2),)) for net in nets]
        a, b = (torch.cat([s["0.weight"], s["0.bias"][:, None]], 1) for s in states)
        distances = (a[:, None] - b).square().sum(-1)
        gains = (threshold * (a.square().sum(1)[:, None] + b.square().sum(1)) - distances) / 2
        places = itertools.product(range(-1, 4), repeat=3)
        best = max(
            sum(float(gains[i, j]) for j, i in enumerate(chosen) if i >= 0)
            for chosen in places
            if len({i for i in chosen if i >= 0}) == sum(i >= 0 for i in chosen)
        )
        found = match_some(*specs, *states, threshold=threshold)["0"]
        assert float((found * gains).sum()) == pytest.approx(best)
        assert bool((gains[found > 0] > 0).all())


def test_what_cannot_grow_is_refused_with_the_way_out() -> None:
    net = mlp(4, 3)
    spec, state = spec_of(net), net.state_dict()
    with pytest.raises(RebasinError, match=r"threshold: expected a number from 0 .* to 2 .*; got 3"):
        matched_averaging([spec, spec], [state, state], threshold=3)
    with pytest.raises(RebasinError, match="specs: expected one for each model; got 1 for 2"):
        matched_averaging([spec], [state, state])
    with pytest.raises(SpecMismatchError, match=r"models\[0\]: expected '0.weight' as \(4, 5\); got \(9, 5\)"):
        matched_averaging([spec, spec], [mlp(9, 3).state_dict(), state])
    layer = build_model("conv", (3, 16, 16), 3, width=4, norm="layer")
    with pytest.raises(RebasinError, match=r"'1.weight' is used by layer_norm in 1, which looks at all units at once"):
        matched_averaging([trace(layer, IMAGE)], [layer.state_dict()])
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(2, 3, 8)
    with pytest.raises(RebasinError, match="heads or groups, whose number cannot change"):
        matched_averaging([trace(attention, (x, x, x))], [attention.state_dict()])
    embedding = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    tokens = (torch.zeros(2, 3, dtype=torch.int64),)
    with pytest.raises(RebasinError, match=r"known to be read along one axis; '0.weight' is used by embedding"):
        matched_averaging([trace(embedding, tokens)], [embedding.state_dict()])
