"""rescale, reshift, closed_form, bias_normalisation, and repair all at once: what each sets, and what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from corrections_ends import State, check_keeps_form, random_ends, run
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from fedrebasin import RebasinError, SpecMismatchError, bias_normalisation, closed_form, merge, repair, rescale, reshift
from fedrebasin.batches import Batches
from fedrebasin.corrections.sites import find_sites
from fedrebasin.simulations.models import build_model

SHARES = [0.5, 0.2, 0.3]
BATCHES = [
    torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)
]


def plain() -> nn.Module:
    convolutions = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 3), nn.Tanh()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(80, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def normed(norm: str) -> Callable[[], nn.Module]:
    return lambda: build_model("conv", (3, 8, 8), 3, width=6, norm=norm).double()


def group_normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(216, 3)).double()


NETS = {"plain": plain, "batchnorm": normed("batch"), "layernorm": normed("layer"), "groupnorm": group_normed}
FAMILY = {
    "repair": repair,
    "repair at once": lambda *given, **options: repair(*given, sequential=False, **options),
    "rescale": rescale,
    "reshift": reshift,
    "closed-form": closed_form,
}


def moments(net: nn.Module, state: State, site: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of a module's output."""
    seen: list[Tensor] = []
    handle = net.get_submodule(site).register_forward_hook(lambda _m, _a, output: seen.append(output))
    for batch in BATCHES:
        run(net, state, batch)
    handle.remove()
    rows = torch.cat(seen).movedim(1, 0).flatten(1)
    return rows.mean(1), rows.std(1, unbiased=False)


def goals(net: nn.Module, ends: list[State], site: str) -> tuple[Tensor, Tensor]:
    found = [moments(net, end, site) for end in ends]
    means, stds = ([share * one[which] for share, one in zip(SHARES, found, strict=True)] for which in (0, 1))
    return torch.stack(means).sum(0), torch.stack(stds).sum(0)


@pytest.mark.parametrize("method", ["repair", "rescale", "reshift"])
@pytest.mark.parametrize("kind", NETS)
def test_the_goals_are_met_behind_the_corrected_layers(method: str, kind: str) -> None:
    net = NETS[kind]()
    ends = random_ends(net, BATCHES, count=3)
    merged = merge(ends, coefficients=SHARES)
    options = {} if method == "reshift" else {"max_gain": 1e6}
    found = FAMILY[method](net, merged, ends, BATCHES, coefficients=SHARES, **options)
    sites = [site.name for site in find_sites(net.eval(), Batches(BATCHES))]
    rtol = 1e-3 if kind == "batchnorm" else 1e-6  # its variance is unbiased, and it adds eps
    for site in sites:
        (mean, std), (goal_mean, goal_std) = moments(net, found, site), goals(net, ends, site)
        if method != "rescale":
            torch.testing.assert_close(mean, goal_mean, rtol=rtol, atol=rtol)
        if method != "reshift":
            torch.testing.assert_close(std, goal_std, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("method", "kept"), [("rescale", 0), ("reshift", 1)])
def test_what_is_not_a_goal_stays_in_the_first_layer(method: str, kept: int) -> None:
    net = plain()
    *ends, merged = random_ends(net, count=4)  # no average: in a first layer that has the goal means already
    found = FAMILY[method](net, merged, ends, BATCHES, coefficients=SHARES)
    before, after = moments(net, merged, "0"), moments(net, found, "0")
    torch.testing.assert_close(after[kept], before[kept], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(after[1 - kept], before[1 - kept], rtol=1e-3)


@pytest.mark.parametrize("method", ["closed-form", "repair at once"])
def test_in_the_first_layer_the_cheap_ways_are_repair(method: str) -> None:
    net = plain()
    ends = random_ends(net, count=3)
    merged = merge(ends, coefficients=SHARES)
    found, exact = (FAMILY[name](net, merged, ends, BATCHES, coefficients=SHARES) for name in (method, "repair"))
    for key in ("0.weight", "0.bias"):
        torch.testing.assert_close(found[key], exact[key], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found["2.weight"], exact["2.weight"], rtol=1e-3)


def test_the_closed_form_is_the_papers_for_two_models() -> None:
    net = plain()
    ends = random_ends(net)
    seen: list[Tensor] = []
    handle = net.get_submodule("2").register_forward_hook(lambda _m, _a, output: seen.append(output))
    for end in ends:
        run(net, end, torch.cat(BATCHES))
    handle.remove()
    a, b = (x.transpose(0, 1).flatten(1) for x in seen)
    lam = 0.3
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)])
    std_a, std_b = a.std(1), b.std(1)
    mixed = 2 * lam * (1 - lam) * std_a * std_b * correlation
    s = (((1 - lam) * std_a) ** 2 + (lam * std_b) ** 2 + mixed).sqrt()
    gain = ((1 - lam) * std_a + lam * std_b) / s
    merged = merge(ends, coefficients=[1 - lam, lam])
    found = closed_form(net, merged, ends, BATCHES, coefficients=[1 - lam, lam])
    torch.testing.assert_close(found["2.weight"], merged["2.weight"] * gain.view(-1, 1, 1, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("kind", NETS)
def test_an_end_merged_with_itself_keeps_its_function(method: str, kind: str) -> None:
    net = NETS[kind]()
    images = [torch.cat(BATCHES)]
    (end,) = random_ends(net, images, count=1, noise=0.1)
    found = FAMILY[method](net, end, [end, end], images, coefficients=[0.3, 0.7])
    torch.testing.assert_close(run(net, found, BATCHES[0]), run(net, end, BATCHES[0]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["repair", "closed-form"])
@pytest.mark.filterwarnings("ignore:calibration")
def test_an_end_with_batchnorms_merged_with_itself_keeps_its_function_on_ten_examples(method: str) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(10, 4, dtype=torch.float64)
    (end,) = random_ends(net, [torch.randn(50, 4, dtype=torch.float64)], count=1)
    found = FAMILY[method](net, end, [end, end], [x])
    torch.testing.assert_close(run(net, found, x), run(net, end, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", FAMILY)
def test_keys_order_and_dtypes_stay_and_inputs_are_not_edited(method: str) -> None:
    net, images = build_model("conv", (3, 8, 8), 3, width=4), [batch.float() for batch in BATCHES]
    ends = random_ends(net, images)
    check_keeps_form(lambda merged, ends: FAMILY[method](net, merged, ends, images), net, ends)


@pytest.mark.parametrize("method", ["repair", "rescale", "closed-form"])
def test_a_gain_below_one_is_refused(method: str) -> None:
    net = plain()
    with pytest.raises(RebasinError, match=r"max_gain: expected 1 or more; got 0\.5"):
        FAMILY[method](net, net.state_dict(), [net.state_dict()], BATCHES, max_gain=0.5)


def test_biases_are_averaged_with_powers_of_the_coefficients() -> None:
    net = plain()
    ends = random_ends(net, count=3)
    merged = merge(ends, coefficients=SHARES)
    found = bias_normalisation(net, merged, ends, BATCHES[0][:1], coefficients=SHARES)
    for depth, key in enumerate(("0", "2", "5", "7"), 1):
        expected = sum(share**depth * end[f"{key}.bias"] for share, end in zip(SHARES, ends, strict=True))
        torch.testing.assert_close(found[f"{key}.bias"], torch.as_tensor(expected), rtol=1e-12, atol=0)
        assert torch.equal(found[f"{key}.weight"], merged[f"{key}.weight"])


class Odd(nn.Module):
    """A grouped and a transposed convolution, a layer that runs twice, and a bias that is added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.up, self.twice = nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 4, 1)
        self.last, self.shift = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.first(x).tanh()).tanh()).tanh()
        x = self.twice(self.twice(x).tanh()).tanh()
        found: Tensor = self.last(x.mean((2, 3))) + self.shift
        return found


def test_every_layer_counts_for_the_depth_and_biases_that_stay_averaged_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Odd().double()
    ends = random_ends(net)
    merged = merge(ends, coefficients=[0.3, 0.7])
    with caplog.at_level(logging.INFO, logger="fedrebasin"):
        found = bias_normalisation(net, merged, ends, BATCHES[0][:1], coefficients=[0.3, 0.7])
    for name, depth in {"first": 1, "grouped": 2, "up": 3, "last": 6}.items():
        a, b = (end[f"{name}.bias"] for end in ends)
        torch.testing.assert_close(found[f"{name}.bias"], 0.3**depth * a + 0.7**depth * b, rtol=1e-12, atol=0)
    said = "bias normalisation: %r stays averaged: it is not the bias of one layer, used once"
    assert sorted(caplog.messages) == [said % name for name in ("shift", "twice.bias")]
    assert all(torch.equal(found[name], merged[name]) for name in ("shift", "twice.bias"))


def test_a_layer_whose_weight_is_computed_counts_for_the_depth_as_well() -> None:
    net = nn.Sequential(weight_norm(nn.Linear(2, 4)), nn.ReLU(), spectral_norm(nn.Linear(4, 4)), nn.ReLU()).double()
    net.append(nn.Linear(4, 1).double())
    ends = random_ends(net)
    found = bias_normalisation(net, merge(ends), ends, torch.zeros(1, 2, dtype=torch.float64))
    for depth, key in enumerate(("0.bias", "2.bias", "4.bias"), 1):
        torch.testing.assert_close(found[key], 0.5**depth * (ends[0][key] + ends[1][key]), rtol=1e-12, atol=0)


def test_networks_that_are_the_same_but_for_disjoint_units_come_out_scaled_by_the_powers() -> None:
    """Each end uses its own half of the units: then the average is the sum of the ends, scaled by depth."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    ends = random_ends(net)
    for end, units in zip(ends, (slice(0, 2), slice(2, 4)), strict=True):
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            end[name][units] = 0
        end["2.weight"][:, units] = 0
        end["4.weight"][:, units] = 0
    x = torch.randn(20, 2, dtype=torch.float64)
    found = bias_normalisation(net, merge(ends), ends, x)
    expected = (run(net, ends[0], x) + run(net, ends[1], x)) / 8
    torch.testing.assert_close(run(net, found, x), expected)


def test_bias_normalisation_of_a_network_with_a_norm_is_refused() -> None:
    net = NETS["layernorm"]()
    with pytest.raises(RebasinError, match="for networks without norms; this one calls layer_norm; use repair"):
        bias_normalisation(net, net.state_dict(), [net.state_dict()], BATCHES[0])


def test_bias_normalisation_refuses_ends_of_another_architecture() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    state = net.state_dict()
    for other in ({**state, "0.bias": torch.zeros(9)}, {name: x for name, x in state.items() if name != "0.bias"}):
        with pytest.raises(
            SpecMismatchError, match=r"net: expected a module of the state dict's architecture; .*0\.bias"
        ):
            bias_normalisation(net, state, [state, other], torch.zeros(1, 2))
