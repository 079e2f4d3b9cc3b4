"""Pieces that networks are grown from, for :mod:`random_networks`: layers, norms, convolutions, other orders.

A piece maps (batch, places, features) to the same kind of tensor, perhaps with other features. A builder takes the
number of features and three small numbers, from which all sizes follow, so that every choice can be built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SIDE = 2
PLACES = SIDE * SIDE  # the pixels of a small image


class Block(nn.Module):
    """A function of a tensor and of the block's own modules and parameters; ``width`` is its number of features."""

    def __init__(self, width: int, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.width, self.function = width, function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


Builder = Callable[..., Block]
SIMPLE: dict[str, Builder] = {}


def piece(builder: Builder) -> Builder:
    SIMPLE[builder.__name__] = builder
    return builder


def divisor(size: int, number: int) -> int:
    """One of the divisors of ``size``."""
    found = [d for d in range(1, size + 1) if size % d == 0]
    return found[number % len(found)]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def around(core: nn.Module, width: int) -> Block:
    return Block(width, lambda net, x: net.core(x), core=core)


def along_line(core: nn.Module, width: int) -> Block:
    return Block(width, lambda net, x: net.core(x.transpose(1, 2)).transpose(1, 2), core=core)


def image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def back(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@piece
def linear(f: int, a: int, b: int, c: int) -> Block:
    return around(nn.Linear(f, a + 1, bias=b % 2 == 0), a + 1)


@piece
def activation(f: int, a: int, b: int, c: int) -> Block:
    function = [torch.relu, torch.tanh, F.gelu, lambda x: x.softmax(-1), lambda x: x - x.mean(-1, True), F.silu][a]
    return Block(f, lambda net, x: function(x))


@piece
def norm(f: int, a: int, b: int, c: int) -> Block:
    if a < 4:
        return around([nn.LayerNorm, nn.RMSNorm][a % 2](f), f)
    return around(nn.LayerNorm([PLACES, f]), f)


@piece
def channel_norm(f: int, a: int, b: int, c: int) -> Block:
    if a == 5:
        return Block(f, lambda net, x: back(net.core(image(x))), core=nn.LayerNorm([f, SIDE, SIDE]))
    group = nn.GroupNorm(divisor(f, b), f)
    return along_line([group, nn.BatchNorm1d(f), nn.InstanceNorm1d(f, affine=True), nn.PReLU(f), group][a], f)


@piece
def line_convolution(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, b)
    kind = [nn.Conv1d, nn.ConvTranspose1d][c % 2]
    core = kind(f, groups * (1 + a % 3), 3, padding=1, groups=groups, bias=c < 4)
    return along_line(core, core.out_channels)


@piece
def image_convolution(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, b)
    width = groups * (1 + a % 3)
    if c % 2:
        core = nn.ConvTranspose2d(f, width, 2, 2, groups=groups)
        return Block(width, lambda net, x: back(F.max_pool2d(net.core(image(x)), 2)), core=core)
    core = nn.Conv2d(f, width, 3, padding=1, groups=groups)
    return Block(width, lambda net, x: back(net.core(image(x))), core=core)


@piece
def pooling(f: int, a: int, b: int, c: int) -> Block:
    pool = [F.max_pool2d, F.avg_pool2d][b % 2]
    if a % 2:
        return Block(f, lambda net, x: back(F.interpolate(pool(image(x), 2), scale_factor=2)))
    up = nn.Conv2d(f, 4 * (1 + c % 3), 1)
    return Block(1 + c % 3, lambda net, x: back(pool(F.pixel_shuffle(net.up(image(x)), 2), 2)), up=up)


@piece
def shuffle(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, a)
    if b % 2:
        return Block(f, lambda net, x: back(F.channel_shuffle(image(x), groups)))
    return Block(f, lambda net, x: x.unflatten(-1, (groups, f // groups)).transpose(-1, -2).flatten(-2))


@piece
def excite(f: int, a: int, b: int, c: int) -> Block:
    down, up = nn.Linear(f, 1 + a), nn.Linear(1 + a, f if b % 3 else 1)
    gate = [torch.sigmoid, lambda x: x.softmax(-1)][c % 2]
    return Block(f, lambda net, x: x * gate(net.up(F.silu(net.down(x.mean(1, True))))), down=down, up=up)


@piece
def glu(f: int, a: int, b: int, c: int) -> Block:
    if b % 2 and f % 2 == 0:
        return Block(f // 2, lambda net, x: F.glu(x, -1))
    return Block(a + 1, lambda net, x: F.glu(net.core(x), -1), core=nn.Linear(f, 2 * (a + 1)))


@piece
def padding(f: int, a: int, b: int, c: int) -> Block:
    return Block(f + a + b, lambda net, x: F.pad(x, (a, b)))


@piece
def scale(f: int, a: int, b: int, c: int) -> Block:
    shape = [(f,), (1, f), (PLACES, f), (PLACES, 1), (), (1, 1, f)][a]
    if b % 3 == 0:
        return Block(f, lambda net, x: x * net.by + 1, by=parameter(*shape))
    return Block(f, lambda net, x: x + net.by.exp(), by=parameter(*shape))


@piece
def normed(f: int, a: int, b: int, c: int) -> Block:
    if b == 4:
        return around(spectral_norm(nn.Linear(f, a + 1)), a + 1)
    if b % 2:
        return along_line(weight_norm(nn.Conv1d(f, a + 1, 1), dim=c % 2), a + 1)
    return around(weight_norm(nn.Linear(f, a + 1), dim=c % 2), a + 1)


@piece
def mixer(f: int, a: int, b: int, c: int) -> Block:
    up, down = nn.Linear(PLACES, a + 1), nn.Linear(a + 1, PLACES)
    return Block(f, lambda net, x: net.down(F.gelu(net.up(x.transpose(1, 2)))).transpose(1, 2), up=up, down=down)


@piece
def repeat(f: int, a: int, b: int, c: int) -> Block:
    times = 1 + a % 3
    if b % 2:
        return Block(f * times, lambda net, x: x.repeat(1, 1, times))
    return Block(f * times, lambda net, x: x.repeat_interleave(times, -1))


@piece
def some(f: int, a: int, b: int, c: int) -> Block:
    if a % 2 and f % 2 == 0:
        return Block(f // 2, lambda net, x: x[..., b % 2 :: 2])
    start = b % f
    size = 1 + c % (f - start)
    return Block(size, lambda net, x: x.narrow(-1, start, size))


@piece
def halves(f: int, a: int, b: int, c: int) -> Block:
    times = 2 + a % 2
    if f % times:
        return linear(f, a, b, c)
    function = [torch.mul, torch.add, lambda x, y: x * y.softmax(-1), lambda x, y: torch.cat([y, x], -1)][b % 4]
    width = (1 + (b % 4 == 3)) * f // times
    return Block(width, lambda net, x: function(x.chunk(times, -1)[0], x.chunk(times, -1)[-1]))


@piece
def ordered(f: int, a: int, b: int, c: int) -> Block:
    function = [lambda x: x.cumsum(1), lambda x: x.sort(-1)[0], lambda x: x.roll(1, 1), lambda x: x.flip(-1)][a % 4]
    return Block(f, lambda net, x: function(x))


@piece
def there_and_back(f: int, a: int, b: int, c: int) -> Block:
    if b % 2:
        return Block(f, lambda net, x: F.linear(F.linear(x, net.core).relu(), net.core.t()), core=parameter(a + 1, f))
    return Block(f, lambda net, x: torch.tanh(x @ net.core) @ net.core.mT, core=parameter(f, a + 1))


@piece
def waves(f: int, a: int, b: int, c: int) -> Block:
    if b % 3 == 0:  # of the features, whose places count then
        return Block(f, lambda net, x: torch.fft.ifft(torch.fft.fft(x).abs()).real)
    by = nn.Parameter(torch.randn(PLACES // 2 + 1, f, a + 1, dtype=torch.cfloat))

    def run(net: Any, x: Tensor) -> Tensor:
        found = torch.einsum(
            "bkf,kfg->bkg", torch.fft.rfft(x, dim=1), net.by.to(torch.promote_types(x.dtype, torch.cfloat))
        )
        return torch.fft.irfft(found, n=PLACES, dim=1)

    return Block(a + 1, run, by=by)


@piece
def masked(f: int, a: int, b: int, c: int) -> Block:
    def features(net: Any, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., net.gate > 0] = 0
        return x

    def places(net: Any, x: Tensor) -> Tensor:
        x = x.clone()
        x[x.sum(-1) > 0] = net.gate
        return x

    def weights(net: Any, x: Tensor) -> Tensor:
        core = net.core.clone()
        core[net.mask > 0] = 0
        return F.linear(x, core)

    if a % 3 < 2:
        return Block(f, [features, places][a % 3], gate=parameter(f))
    return Block(b + 1, weights, core=parameter(b + 1, f), mask=parameter(b + 1, f))
