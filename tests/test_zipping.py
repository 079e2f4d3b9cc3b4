"""ZipIt: redundant units of one model make room for the other's, where permutations cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from widths_cases import IMAGE, alive, mlp, spec_of, widened

from fedrebasin import RebasinError, merge_trunks, permute, random_perms, trace, zip_trunks
from fedrebasin.simulations.models import build_model
from fedrebasin.zipping import _groups

State = dict[str, Tensor]
X = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
SOURCES = {"0": [0, 0, 1, 1, 2, 2], "2": [0, 0, 1, 1, 2, 2, 3, 3]}
SHARES = {"0": [0.5] * 6, "2": [0.3, 0.7] * 4}


def redundant(seed: int) -> State:
    """Six and eight units, half of which are copies: the two models together have six and eight that differ."""
    wide = widened(mlp(3, 4, seed).state_dict(), SOURCES, SHARES)
    net = mlp(6, 8)
    return {k: v.float() for k, v in permute(spec_of(net), random_perms(spec_of(net), seed), wide).items()}


@pytest.mark.parametrize("coefficients", [None, [0.9, 0.1]])
def test_two_redundant_models_fit_into_one_trunk_exactly_and_permutations_cannot_do_it(
    coefficients: list[float] | None,
) -> None:
    net, states = mlp(6, 8), [redundant(1), redundant(2)]
    spec = spec_of(net)
    zipped = zip_trunks([spec] * 2, net, states, [X], until="2", coefficients=coefficients)
    merged = merge_trunks([spec] * 2, states, until="2", coefficients=coefficients)
    for state, own, other in zip(states, zipped, merged, strict=True):
        expected = functional_call(net, state, X)
        torch.testing.assert_close(functional_call(net, own, X), expected, rtol=1e-4, atol=1e-5)
        assert (functional_call(net, other, X) - expected).norm() > 0.05 * expected.norm()
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(zipped[0][name], zipped[1][name])


@pytest.mark.parametrize(("name", "until"), [("mlp", "5"), ("mlp", "7"), ("conv", "7")])
def test_permuted_copies_zip_to_their_own_function_norms_outputs_and_all(name: str, until: str) -> None:
    net = build_model(name, (3, 16, 16), 3, width=6).eval().double()
    spec = trace(net, (IMAGE[0].double(),))
    state = alive(net)
    states = [permute(spec, random_perms(spec, seed), state) for seed in range(2)]
    x = torch.randn(64, 3, 16, 16, dtype=torch.float64)
    for own in zip_trunks([spec] * 2, net, states, [x], until=until, coefficients=[0.3, 0.7]):
        torch.testing.assert_close(functional_call(net, own, x), functional_call(net, state, x))


def test_heads_of_several_sizes_stay_apart_and_behind_a_deeper_head_nothing_is_zipped() -> None:
    nets = [nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, classes)) for classes in (2, 3)]
    specs, states = [trace(net, (X[:2],)) for net in nets], [net.state_dict() for net in nets]
    one, other = zip_trunks(specs, nets[0], states, [X], until="0")
    assert (one["2.weight"].shape, other["2.weight"].shape) == ((2, 6), (3, 6))
    assert torch.equal(other["2.bias"], states[1]["2.bias"])
    deep = mlp(6, 8)
    spec, pair = spec_of(deep), [mlp(6, 8, seed).state_dict() for seed in (1, 2)]
    zipped = zip_trunks([spec] * 2, deep, pair, [X], until="0")
    for own, state in zip(zipped, pair, strict=True):
        assert torch.equal(own["4.weight"], state["4.weight"]) and torch.equal(own["2.bias"], state["2.bias"])


def test_groups_are_made_of_the_most_alike_and_the_least_alike_pair_of_two_groups_counts() -> None:
    scores = torch.tensor([[1, 0.9, 0.1, 0], [0.9, 1, 0.8, 0], [0.1, 0.8, 1, 0.5], [0, 0, 0.5, 1]])
    assert _groups(scores, 3).tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert _groups(scores, 2).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]  # not 2 with 1, though they are 0.8 alike
    silent = torch.tensor([[1, 1, 0.9], [1, 1, 0.9], [0.9, 0.9, 2]])  # the first two are alive at one place, not two
    assert _groups(silent, 2).tolist() == [[1, 1, 0], [0, 0, 1]]


def test_what_cannot_be_zipped_is_refused_with_the_way_out() -> None:
    net = build_model("conv", (3, 16, 16), 3, width=4)
    spec, state = trace(net, IMAGE), net.state_dict()
    images = [torch.randn(8, 3, 16, 16)]
    with pytest.raises(RebasinError, match=r"until: '1.weight' of the head, used by batch_norm.*; share it too"):
        zip_trunks([spec] * 2, net, [state, state], images, until="0")
    with pytest.raises(RebasinError, match="models: expected two, and a spec for each; got 1 and 2 specs"):
        zip_trunks([spec] * 2, net, [state], images, until="7")
    layer = build_model("conv", (3, 16, 16), 3, width=4, norm="layer")
    with pytest.raises(RebasinError, match="looks at all units at once"):
        zip_trunks([trace(layer, IMAGE)] * 2, layer, [layer.state_dict()] * 2, images, until="4")
