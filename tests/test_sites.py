"""Where REPAIR applies: what is a site, what is none and why, and that the goals are met there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from corrections_ends import draw, random_ends
from networks_by_hand import Functions, HandNorm, LastNorm, Rectified
from torch import Tensor, nn

from fedrebasin import closed_form, least_squares, merge, repair
from fedrebasin.batches import Batches
from fedrebasin.corrections.moments import output_moments
from fedrebasin.corrections.sites import find_calls, find_sites


def by_modules(hand: Functions) -> nn.Module:
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3, affine=False), nn.ReLU(), nn.AvgPool2d(8)),
        *(nn.Flatten(), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2)),
    )
    net.load_state_dict(renamed(hand.state_dict()), strict=False)
    return net.double()


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the names of ``Functions`` to those of ``by_modules``."""
    places = {"kernel": "0", "narrow": "5", "wide": "7", "last": "9"}
    result = {f"{place}.weight": state[name].T if name == "wide" else state[name] for name, place in places.items()}
    result |= {f"{place}.bias": state[f"{name}_shift"] for name, place in places.items()}
    return result | {"1.running_mean": state["center"], "1.running_var": state["spread"]}


IMAGES = [draw(40, 3, 8, 8, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("sequential", [True, False])
def test_a_network_of_functions_is_repaired_like_the_same_one_of_modules(sequential: bool) -> None:
    hand = Functions()
    ends = random_ends(hand, IMAGES)
    net = by_modules(hand)
    other = [{**net.state_dict(), **renamed(end)} for end in ends]
    for correct in (lambda *given: repair(*given, sequential=sequential), closed_form):
        found = renamed(correct(hand, merge(ends), ends, IMAGES))
        wanted = correct(net, merge(other), other, IMAGES)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
    sites = find_sites(hand, Batches(IMAGES))
    assert [(site.name, site.weight_dim, site.running is None) for site in sites] == [
        ("center", 0, False),
        ("narrow", 0, True),
        ("wide", 1, True),
    ]


class Residual(nn.Module):
    """A stream that two blocks write to, with whatever norm, or none."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        bias = isinstance(norm(4), nn.Identity)
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(4, 6, 3, padding=1, bias=bias), norm(6), nn.ReLU(inplace=True)),
                *(nn.Conv2d(6, 4, 3, padding=1, bias=bias), norm(4)),
            )
            for _ in range(2)
        )
        self.norm, self.head = norm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class PreNorm(nn.Module):
    """A stream that the first layer starts, and that goes into a norm before each block."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.into, self.out = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norms = nn.ModuleList(norm(width) for width in (4, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.out(self.norms[1](self.into(self.norms[0](x).relu())).relu())
        return self.last(self.norms[2](x).relu())


STREAM = ["stem", "norms.0", "norms.1", "out", "norms.2"]
NORMED = ["norm", "blocks.0.1", "blocks.0.4", "blocks.1.1", "blocks.1.4"]
BARE = ["stem", "blocks.0.0", "blocks.0.3", "blocks.1.0", "blocks.1.3"]


def sequence(norm: Callable[[int], nn.Module]) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer, norm(8), nn.Flatten(), nn.Linear(24, 2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Tensor], list[str]]] = {
    "batch": (lambda: Residual(nn.BatchNorm2d), IMAGES, NORMED),
    "group": (lambda: Residual(lambda n: nn.GroupNorm(2, n)), IMAGES, NORMED),
    "instance": (lambda: Residual(lambda n: nn.InstanceNorm2d(n, affine=True)), IMAGES, NORMED),
    "hand": (lambda: Residual(HandNorm), IMAGES, NORMED),
    "stream": (lambda: PreNorm(nn.BatchNorm2d), IMAGES, STREAM),
    "stream by hand": (lambda: PreNorm(HandNorm), IMAGES, STREAM),
    "none": (lambda: Residual(lambda n: nn.Identity()), IMAGES, BARE),
    "as many positions as channels": (
        lambda: nn.Sequential(nn.Linear(5, 4), LastNorm(4), nn.Flatten(), nn.Linear(16, 2)),
        [draw(60, 4, 5, seed=seed) for seed in range(3)],
        ["1"],
    ),
    "attention": (
        lambda: sequence(nn.LayerNorm),
        [draw(60, 3, 5, seed=seed) for seed in range(3)],
        [
            "0",
            "1.self_attn.in_proj_weight",
            "1.self_attn.out_proj",
            "1.norm1",
            "1.linear1",
            "1.linear2",
            "1.norm2",
            "2",
        ],
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 5, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 3)
        ),
        IMAGES,
        ["0", "2"],  # what is written over in place before the norm does not go straight into it
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_site_gets_the_mean_and_std_of_the_ends(name: str) -> None:
    make, data, names = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double().eval()
    sites = find_sites(net, Batches(data))
    assert [site.name for site in sites] == names
    ends, weights = random_ends(net, data, count=3), [0.5, 0.3, 0.2]
    found = repair(net, merge(ends, coefficients=weights), ends, data, coefficients=weights, max_gain=1e6)

    def moments(state: dict[str, Tensor]) -> Any:
        net.load_state_dict(state)
        return output_moments(net, Batches(data), sites)

    measured, goals = moments(found), [moments(end) for end in ends]
    for site in sites:
        for part in ("mean", "std"):
            goal = sum(weight * getattr(one[site.name], part) for weight, one in zip(weights, goals, strict=True))
            assert len(goal) == site.channels
            torch.testing.assert_close(getattr(measured[site.name], part), goal, rtol=2e-3, atol=2e-3)


class Odd(nn.Module):
    """Layers that take no map of their own, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bare, self.twice = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.tied, self.tied_too = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied_too.weight = self.tied.weight
        self.root, self.both, self.rectified = nn.RMSNorm(4), nn.LayerNorm((1, 4)), Rectified(4)
        self.up, self.lstm = nn.ConvTranspose1d(4, 4, 1, groups=2), nn.LSTM(4, 4, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.bare(self.plain(x).relu()).relu()))
        x = self.root(self.tied_too(self.tied(x).relu()).relu())
        x = self.rectified(x[..., None, None])[..., 0, 0]
        x = self.both(x[:, None]).relu()
        return self.last(self.lstm(self.up(x.mT).relu().mT)[0][:, -1])


def test_what_is_no_site_is_named_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedrebasin"):
        sites = find_sites(Odd().double().eval(), Batches([draw(50, 4)]))
    assert [site.name for site in sites] == ["plain"]
    said = dict(
        message.split("correction: ")[1].split(" takes no affine map of its own: ") for message in caplog.messages
    )
    unread = "no linear or convolution layer reads it directly"
    assert said == {
        "'bare.weight'": "it has no bias",
        "'twice.weight'": "it is used more than once",
        "'tied_too.weight'": "it is used more than once",
        "'root.weight'": "it has no bias",
        "'both.weight'": "it has other numbers than one a channel",
        "'rectified.weight'": "its output is no affine map of its weight and bias",
        "'up.weight'": "a grouped transposed convolution",
        "'lstm.weight_ih_l0'": unread,
        "'lstm.weight_hh_l0'": unread,
    }


class Shared(nn.Module):
    """One layer that runs twice, each time straight into a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first, self.second, self.last = (
            nn.Linear(4, 4),
            *(nn.BatchNorm1d(4) for _ in "12"),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.layer(self.first(self.layer(x)).relu())).relu())


def test_a_layer_that_runs_twice_into_norms_is_no_call_that_a_pass_may_keep() -> None:
    net, data = Shared().double().eval(), [draw(60, 4), draw(50, 4, seed=1)]
    assert [call.name for call in find_calls(net, Batches(data))] == ["first", "second", "last"]
    ends = random_ends(net, data)
    found, wanted = (repair(net, merge(ends), ends, data, memory=memory) for memory in (2**30, 0))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_least_squares_leaves_a_batchnorm_of_functions_as_it_is() -> None:
    hand = Functions()
    ends = random_ends(hand, IMAGES)
    merged = merge(ends)
    found = least_squares(hand, merged, ends, IMAGES)
    assert all(torch.equal(found[name], merged[name]) for name in ("center", "spread"))
    assert not torch.equal(found["kernel"], merged["kernel"])
