"""Positions that a convolution or a pool does not mix are as free as a batch; those that it mixes stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedrebasin import check_spec, trace
from fedrebasin.layout import Fixed

ORDER = torch.tensor([3, 0, 5, 1, 2, 4])


class Net(nn.Module):
    """Six units that lie along the last axis, behind eight rows of their own, where ``between`` slides windows."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.first(x).tanh())
        found: Tensor = self.last(h.flatten(1, -2).sum(1))
        return found


def _move(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs before and after the six units are permuted by hand."""
    state = net.state_dict()
    moved = {name: state[name][ORDER] for name in ("first.weight", "first.bias")}
    moved["last.weight"] = state["last.weight"][:, ORDER]
    return net(x), functional_call(net, {**state, **moved}, (x,))


ROWS, IMAGES, VOLUMES = (torch.randn(2, 4, *[8] * more, 5, dtype=torch.float64) for more in range(3))


def _case(given: Tensor, layer: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Any:
    return given, lambda: layer(4, 4, *sizes, **options)


class Places(nn.Module):
    """Where each maximum is: the number of its place in the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, (3, 1), return_indices=True)[1].to(x.dtype)


MODES = ["nearest", "nearest-exact", "bilinear", "bicubic"]


def _resized(mode: str, **options: Any) -> Any:
    def make() -> Any:
        return lambda x: F.interpolate(x, mode=mode, **options)

    return IMAGES, make


FREE = {
    "a window of 1": _case(ROWS, nn.Conv1d, 1),
    "dilated": _case(ROWS, nn.Conv1d, 1, dilation=3),
    "groups": _case(ROWS, nn.Conv1d, 1, groups=2),
    "depthwise": _case(ROWS, nn.Conv1d, 1, groups=4, bias=False),
    "along the last axis": _case(IMAGES, nn.Conv2d, (3, 1)),
    "the other one as it may be": _case(IMAGES, nn.Conv2d, (3, 1), stride=(2, 1), padding=(1, 0)),
    "same": _case(IMAGES, nn.Conv2d, (3, 1), padding="same"),
    "valid": _case(IMAGES, nn.Conv2d, (3, 1), padding="valid"),
    "three axes": _case(VOLUMES, nn.Conv3d, (3, 2, 1), padding=(1, 0, 0), groups=2),
    "transposed": _case(ROWS, nn.ConvTranspose1d, 1),
    "transposed groups": _case(IMAGES, nn.ConvTranspose2d, (3, 1), stride=(2, 1), output_padding=(1, 0), groups=2),
    "mean": (IMAGES, lambda: nn.AvgPool2d((3, 1))),
    "mean, overlapping": (IMAGES, lambda: nn.AvgPool2d((3, 1), (2, 1), (1, 0), ceil_mode=True)),
    "maximum": (IMAGES, lambda: nn.MaxPool2d((3, 1))),
    "maximum, overlapping": (VOLUMES, lambda: nn.MaxPool3d((3, 2, 1), (2, 1, 1), (1, 1, 0))),
    "maximum of one": (ROWS, lambda: nn.MaxPool1d(1)),
    "power": (IMAGES, lambda: nn.LPPool2d(2, (2, 1))),
    "adaptive": (IMAGES, lambda: nn.AdaptiveAvgPool2d((1, None))),
    "adaptive of one": (ROWS, lambda: nn.AdaptiveAvgPool1d(6)),
    **{f"{mode} by factors": _resized(mode, scale_factor=(2.0, 1.0)) for mode in MODES},
    **{f"{mode} to a size": _resized(mode, size=(5, 6)) for mode in MODES},
    **{f"{mode} from end to end": _resized(mode, size=(12, 6), align_corners=True) for mode in MODES[2:]},
    **{f"{mode} smoothed": _resized(mode, size=(3, 6), antialias=True) for mode in MODES[2:]},
    "reflected at the ends of the other": (IMAGES, lambda: nn.ReflectionPad2d((0, 0, 1, 2))),
}

FIXED = {
    "a window of 3": _case(ROWS, nn.Conv1d, 3, padding=1),
    "moved by 2": _case(ROWS, nn.Conv1d, 1, stride=2),
    "padded": _case(ROWS, nn.Conv1d, 1, padding=1),
    "along the rows": _case(IMAGES, nn.Conv2d, (1, 3), padding=(0, 1)),
    "moved by 2 along the last axis": _case(IMAGES, nn.Conv2d, (3, 1), stride=(1, 2)),
    "same of 3": _case(IMAGES, nn.Conv2d, 3, padding="same"),
    "transposed of 3": _case(ROWS, nn.ConvTranspose1d, 3, padding=1),
    "transposed and cut": _case(IMAGES, nn.ConvTranspose2d, 1, padding=(0, 1)),
    "transposed and added to": _case(ROWS, nn.ConvTranspose1d, 1, dilation=2, output_padding=1),
    "mean along the units": (IMAGES, lambda: nn.AvgPool2d((1, 3))),
    "mean, every second": (IMAGES, lambda: nn.AvgPool2d((3, 1), (3, 2))),
    "mean, every third, as wide as a window": (IMAGES, lambda: nn.AvgPool2d(3)),
    "maximum, moved by 2": (IMAGES, lambda: nn.MaxPool2d(1, 2)),
    "maximum along the units": (ROWS, lambda: nn.MaxPool1d(3, 1, 1)),
    "places of the maximum": (IMAGES, lambda: Places()),
    **{f"{mode} by factors": _resized(mode, scale_factor=(1.0, 2.0)) for mode in MODES},
    **{f"{mode} by a factor near 1": _resized(mode, scale_factor=(1.0, 1.1)) for mode in MODES},
    "reflected": (IMAGES, lambda: nn.ReflectionPad2d((0, 1, 0, 0))),
    "adaptive along the units": (IMAGES, lambda: nn.AdaptiveAvgPool2d((None, 4))),
}


@pytest.mark.parametrize("name", FREE)
def test_an_axis_along_which_a_window_holds_one_position_is_free(name: str) -> None:
    x, make = FREE[name]
    net = Net(make()).double()
    assert check_spec(net, trace(net, (x,), strict=True), (x,)).perm_shapes["first"] == (6,)
    torch.testing.assert_close(*_move(net, x))


@pytest.mark.parametrize("name", FIXED)
def test_an_axis_along_which_a_window_mixes_leaves_out_or_adds_is_fixed(name: str) -> None:
    x, make = FIXED[name]
    net = Net(make()).double()
    net.last = nn.Linear(net.between(net.first(x)).shape[-1], 2).double()
    spec = check_spec(net, trace(net, (x,), strict=True), (x,))
    assert spec.axes["first.weight"][0] == Fixed(6, "kernel or spatial")


class Mixer(nn.Module):
    """As lucidrains' MLP-Mixer: tokens are mixed by convolutions of one position over the stream's units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 6), nn.Linear(6, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.tokens = nn.Sequential(nn.Conv1d(4, 7, 1), nn.GELU(), nn.Conv1d(7, 4, 1))
        self.units = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norms[0](x))
        x = x + self.units(self.norms[1](x))
        found: Tensor = self.head(x.mean(1))
        return found


def test_the_stream_of_a_mixer_of_convolutions_is_free_and_permuting_it_by_hand_keeps_the_outputs() -> None:
    net, x = Mixer().double(), torch.randn(2, 4, 12, dtype=torch.float64)
    spec = check_spec(net, trace(net, (x,), strict=True), (x,))
    assert spec.perm_shapes == {"embed": (6,), "tokens.0": (7,), "units.0": (9,)}
    state = net.state_dict()
    rows = [*(f"norms.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")), "units.2.weight", "units.2.bias"]
    moved = {name: state[name][ORDER] for name in ("embed.weight", "embed.bias", *rows)}
    moved |= {name: state[name][:, ORDER] for name in ("head.weight", "units.0.weight")}
    torch.testing.assert_close(functional_call(net, {**state, **moved}, (x,)), net(x))


class Rows(nn.Module):
    """Hidden units that are viewed as channels of positions, which a convolution of one position goes over."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.first, self.mix, self.out = nn.Linear(5, 24), nn.Conv1d(4, 3, 1), nn.Linear(18, 2)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h.view(-1, 6, 4).transpose(1, 2) if self.last else h.view(-1, 4, 6)
        found: Tensor = self.out(self.mix(h).relu().flatten(1))
        return found


@pytest.mark.parametrize("last", [False, True])
def test_all_channels_share_one_order_of_positions_and_all_positions_one_of_channels(last: bool) -> None:
    net, inputs = Rows(last=last), (torch.randn(3, 5),)
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    assert sorted(spec.perm_shapes.values()) == [(3,), (4,), (6,)]


@pytest.mark.parametrize("mix", [nn.Conv2d(4, 4, (3, 1)), nn.AvgPool2d((2, 1)), nn.AdaptiveAvgPool2d((1, None))])
def test_rows_that_are_mixed_share_one_order_of_columns(mix: nn.Module) -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mix, self.out = nn.Linear(5, 96), mix, nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.out(self.mix(self.first(x).tanh().view(-1, 4, 4, 6)).relu().flatten(1))
            return found

    net, inputs = Grid(), (torch.randn(3, 5),)
    net(*inputs)
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    columns = (6,) if isinstance(mix, nn.Conv2d) else (4, 6)  # a pool keeps channels apart
    assert columns in spec.perm_shapes.values() and not any(shape[:-1] == (4, 4) for shape in spec.perm_shapes.values())
