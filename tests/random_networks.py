"""Networks grown at random out of the pieces that tracing supports, for :mod:`test_random_networks`.

A piece maps (batch, places, features) to the same kind of tensor, perhaps with other features; its sizes follow
from three small numbers, so that every plan can be built. Some pieces hold chains of pieces of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SIDE = 2  # places are the pixels of a 2 x 2 image
PLACES = SIDE * SIDE
WIDEST = 24


@dataclass(frozen=True)
class Piece:
    """What one piece of a network does, its sizes, and the chains that it holds."""

    kind: str
    numbers: tuple[int, int, int]
    chains: tuple[tuple[Piece, ...], ...] = ()


@dataclass(frozen=True)
class Plan:
    """A whole network: how it reads its input, its first width, its pieces, and how it writes its output."""

    stem: str
    width: int
    pieces: tuple[Piece, ...]
    head: str


class Block(nn.Module):
    """A function of a tensor and of the block's own modules and parameters."""

    def __init__(self, width: int, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.width, self.function = width, function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


Builder = Callable[..., Block]
SIMPLE: dict[str, Builder] = {}
HOLDING: dict[str, Builder] = {}


def _piece(table: dict[str, Builder]) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        table[builder.__name__.strip("_")] = builder
        return builder

    return register


def divisor(size: int, number: int) -> int:
    """One of the divisors of ``size``."""
    found = [d for d in range(1, size + 1) if size % d == 0]
    return found[number % len(found)]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def chain(pieces: Sequence[Piece], width: int) -> nn.Sequential:
    """The pieces one after the other; what grows too wide is made narrow again."""
    found: list[nn.Module] = []
    for piece in pieces:
        builder = SIMPLE.get(piece.kind) or HOLDING[piece.kind]
        found.append(builder(width, *piece.numbers, *([piece.chains] if piece.kind in HOLDING else [])))
        width = found[-1].width
        if width > WIDEST:
            found.append(_linear(width, 4, 0, 0))
            width = found[-1].width
    result = nn.Sequential(*found)
    result.width = width
    return result


def _image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def _back(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@_piece(SIMPLE)
def _linear(f: int, a: int, b: int, c: int) -> Block:
    return Block(a + 1, lambda net, x: net.core(x), core=nn.Linear(f, a + 1, bias=b % 2 == 0))


@_piece(SIMPLE)
def _activation(f: int, a: int, b: int, c: int) -> Block:
    function = [torch.relu, torch.tanh, F.gelu, lambda x: x.softmax(-1), lambda x: x - x.mean(-1, True), F.silu][a]
    return Block(f, lambda net, x: function(x))


@_piece(SIMPLE)
def _norm(f: int, a: int, b: int, c: int) -> Block:
    return Block(f, lambda net, x: net.core(x), core=[nn.LayerNorm, nn.RMSNorm][a % 2](f))


@_piece(SIMPLE)
def _channel_norm(f: int, a: int, b: int, c: int) -> Block:
    group = nn.GroupNorm(divisor(f, b), f)
    core = [group, nn.BatchNorm1d(f), nn.InstanceNorm1d(f, affine=True), nn.PReLU(f), group, nn.BatchNorm1d(f)][a]
    return Block(f, lambda net, x: net.core(x.transpose(1, 2)).transpose(1, 2), core=core)


@_piece(SIMPLE)
def _line_convolution(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, b)
    kind = [nn.Conv1d, nn.ConvTranspose1d][c % 2]
    core = kind(f, groups * (1 + a % 3), 3, padding=1, groups=groups, bias=c < 4)
    return Block(core.out_channels, lambda net, x: net.core(x.transpose(1, 2)).transpose(1, 2), core=core)


@_piece(SIMPLE)
def _image_convolution(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, b)
    if c % 2:
        core = nn.ConvTranspose2d(f, groups * (1 + a % 3), 2, 2, groups=groups)
        return Block(core.out_channels, lambda net, x: _back(F.max_pool2d(net.core(_image(x)), 2)), core=core)
    core = nn.Conv2d(f, groups * (1 + a % 3), 3, padding=1, groups=groups)
    return Block(core.out_channels, lambda net, x: _back(net.core(_image(x))), core=core)


@_piece(SIMPLE)
def _pooling(f: int, a: int, b: int, c: int) -> Block:
    pool = [F.max_pool2d, F.avg_pool2d][b % 2]
    if a % 2:
        return Block(f, lambda net, x: _back(F.interpolate(pool(_image(x), 2), scale_factor=2)))
    up = nn.Conv2d(f, 4 * (1 + c % 3), 1)
    return Block(1 + c % 3, lambda net, x: _back(pool(F.pixel_shuffle(net.up(_image(x)), 2), 2)), up=up)


@_piece(SIMPLE)
def _shuffle(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, a)
    if b % 2:
        return Block(f, lambda net, x: F.channel_shuffle(_image(x), groups).flatten(2).transpose(1, 2))
    return Block(f, lambda net, x: x.unflatten(-1, (groups, f // groups)).transpose(-1, -2).flatten(-2))


@_piece(SIMPLE)
def _excite(f: int, a: int, b: int, c: int) -> Block:
    down, up = nn.Linear(f, 1 + a), nn.Linear(1 + a, f if b % 3 else 1)
    gate = [torch.sigmoid, lambda x: x.softmax(-1)][c % 2]
    return Block(f, lambda net, x: x * gate(net.up(F.silu(net.down(x.mean(1, True))))), down=down, up=up)


@_piece(SIMPLE)
def _glu(f: int, a: int, b: int, c: int) -> Block:
    if b % 2 and f % 2 == 0:
        return Block(f // 2, lambda net, x: F.glu(x, -1))
    return Block(a + 1, lambda net, x: F.glu(net.core(x), -1), core=nn.Linear(f, 2 * (a + 1)))


@_piece(SIMPLE)
def _attention(f: int, a: int, b: int, c: int) -> Block:
    heads, size, shared = 1 + a % 3, 1 + b % 3, 1 + a // 3
    full, few = heads * shared * size, heads * size
    parts = {"q": nn.Linear(f, full), "k": nn.Linear(f, few), "v": nn.Linear(f, few), "out": nn.Linear(full, f)}

    def attend(net: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, size)).transpose(1, 2) for part in (net.q, net.k, net.v))
        if c % 2:
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (part.repeat_interleave(shared, 1) for part in (k, v))
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return net.out(mixed.transpose(1, 2).flatten(2))

    return Block(f, attend, **parts)


@_piece(SIMPLE)
def _fused_attention(f: int, a: int, b: int, c: int) -> Block:
    heads, size = 1 + a % 3, 1 + b % 3
    parts = {"qkv": nn.Linear(f, 3 * heads * size, bias=c < 3), "out": nn.Linear(heads * size, 1 + b)}

    def attend(net: Any, x: Tensor) -> Tensor:
        if c % 3 == 0:
            q, k, v = net.qkv(x).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
        elif c % 3 == 1:
            q, k, v = (part.unflatten(-1, (heads, size)).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))
        else:
            q, k, v = net.qkv(x).unflatten(-1, (heads, 3 * size)).transpose(1, 2).split(size, -1)
        return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Block(1 + b, attend, **parts)


@_piece(SIMPLE)
def _multihead(f: int, a: int, b: int, c: int) -> Block:
    core = nn.MultiheadAttention(f, divisor(f, a), batch_first=True, bias=b % 2 == 0, add_bias_kv=b == 5)
    return Block(f, lambda net, x: net.core(x, x, x, need_weights=bool(c % 2))[0], core=core)


@_piece(SIMPLE)
def _recurrent(f: int, a: int, b: int, c: int) -> Block:
    kind, ways = [nn.LSTM, nn.GRU, nn.RNN][b % 3], 1 + c % 2
    options = {"proj_size": a} if b == 3 and a else {}
    core = kind(f, a + 1, 1 + c // 3, batch_first=True, bidirectional=ways == 2, **options)
    return Block(ways * (options.get("proj_size") or a + 1), lambda net, x: net.core(x)[0], core=core)


@_piece(SIMPLE)
def _stacked(f: int, a: int, b: int, c: int) -> Block:
    count, size = 1 + a % 3, 1 + b % 3
    if c % 3 == 0:
        return Block(
            count * size,
            lambda net, x: torch.einsum("btf,nfh->btnh", x, net.all).flatten(2),
            all=parameter(count, f, size),
        )
    if c % 3 == 1:
        return Block(size, lambda net, x: (x[:, None] @ net.all).relu().sum(1), all=parameter(count, f, size))
    experts = {"up": parameter(count, f, size), "down": parameter(count, size, f), "gate": nn.Linear(f, count)}

    def mix(net: Any, x: Tensor) -> Tensor:
        hidden = torch.einsum("btf,nfh->btnh", x, net.up).relu()
        return torch.einsum("btnh,nhf,btn->btf", hidden, net.down, net.gate(x).softmax(-1))

    return Block(f, mix, **experts)


@_piece(SIMPLE)
def _group_linear(f: int, a: int, b: int, c: int) -> Block:
    groups, size = divisor(f, a), 1 + b % 3
    return Block(
        groups * size,
        lambda net, x: torch.einsum("btgu,guv->btgv", x.unflatten(-1, (groups, -1)), net.core).flatten(2),
        core=parameter(groups, f // groups, size),
    )


@_piece(SIMPLE)
def _within_groups(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, a)
    size = f // groups
    if b % 3 == 0:
        return Block(f, lambda net, x: net.core(x.unflatten(-1, (groups, size))).flatten(2), core=nn.LayerNorm(size))
    if b % 3 == 1:
        return Block(groups, lambda net, x: x.unflatten(-1, (groups, size)).amax(-1))
    return Block(size, lambda net, x: x.unflatten(-1, (groups, size)).mean(-2))


@_piece(SIMPLE)
def _padding(f: int, a: int, b: int, c: int) -> Block:
    return Block(f + a + b, lambda net, x: F.pad(x, (a, b)))


@_piece(SIMPLE)
def _scale(f: int, a: int, b: int, c: int) -> Block:
    shape = [(f,), (1, f), (PLACES, f), (PLACES, 1), (), (1, 1, f)][a]
    if b % 3 == 0:
        return Block(f, lambda net, x: x * net.by + 1, by=parameter(*shape))
    return Block(f, lambda net, x: x + net.by.exp(), by=parameter(*shape))


@_piece(SIMPLE)
def _normed(f: int, a: int, b: int, c: int) -> Block:
    if b == 4:
        return Block(a + 1, lambda net, x: net.core(x), core=spectral_norm(nn.Linear(f, a + 1)))
    if b % 2:
        core: Any = weight_norm(nn.Conv1d(f, a + 1, 1), dim=c % 2)
        return Block(a + 1, lambda net, x: net.core(x.transpose(1, 2)).transpose(1, 2), core=core)
    return Block(a + 1, lambda net, x: net.core(x), core=weight_norm(nn.Linear(f, a + 1), dim=c % 2))


@_piece(SIMPLE)
def _mixer(f: int, a: int, b: int, c: int) -> Block:
    up, down = nn.Linear(PLACES, a + 1), nn.Linear(a + 1, PLACES)
    return Block(f, lambda net, x: net.down(F.gelu(net.up(x.transpose(1, 2)))).transpose(1, 2), up=up, down=down)


@_piece(SIMPLE)
def _repeat(f: int, a: int, b: int, c: int) -> Block:
    times = 1 + a % 3
    if b % 2:
        return Block(f * times, lambda net, x: x.repeat(1, 1, times))
    return Block(f * times, lambda net, x: x.repeat_interleave(times, -1))


@_piece(SIMPLE)
def _outer(f: int, a: int, b: int, c: int) -> Block:
    core = nn.Linear(f, 1 + a % 3)
    if b % 2:
        return Block(f * (1 + a % 3), lambda net, x: (x[..., None] * net.core(x)[..., None, :]).flatten(2), core=core)
    return Block(f * (1 + a % 3), lambda net, x: (x[..., None, :] * net.core(x)[..., None]).flatten(2), core=core)


@_piece(SIMPLE)
def _bilinear(f: int, a: int, b: int, c: int) -> Block:
    return Block(a + 1, lambda net, x: net.core(x, x), core=nn.Bilinear(f, f, a + 1))


@_piece(SIMPLE)
def _some(f: int, a: int, b: int, c: int) -> Block:
    if a % 2 and f % 2 == 0:
        return Block(f // 2, lambda net, x: x[..., ::2] if b % 2 else x[..., 1::2])
    start = b % f
    size = 1 + c % (f - start)
    return Block(size, lambda net, x: x.narrow(-1, start, size))


@_piece(SIMPLE)
def _ordered(f: int, a: int, b: int, c: int) -> Block:
    function = [lambda x: x.cumsum(1), lambda x: x.sort(-1)[0], lambda x: x.roll(1, 1), lambda x: x.flip(-1)][a % 4]
    return Block(f, lambda net, x: function(x))


@_piece(SIMPLE)
def _halves(f: int, a: int, b: int, c: int) -> Block:
    times = 2 + a % 2
    if f % times:
        return _linear(f, a, b, c)
    function = [torch.mul, torch.add, lambda x, y: x * y.softmax(-1), lambda x, y: torch.cat([y, x], -1)][b % 4]
    return Block(
        2 * f // times if b % 4 == 3 else f // times,
        lambda net, x: function(x.chunk(times, -1)[0], x.chunk(times, -1)[-1]),
    )


@_piece(SIMPLE)
def _between_groups(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, a)
    size = f // groups

    def run(net: Any, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (groups, size))
        mixed = torch.einsum("btgu,mgu->btm", x, net.core)
        return mixed + x.sum(-1) if b % 2 else mixed

    return Block(groups, run, core=parameter(groups, groups, size))


@_piece(SIMPLE)
def _grid_norm(f: int, a: int, b: int, c: int) -> Block:
    if a % 2:
        return Block(f, lambda net, x: _back(net.core(_image(x))), core=nn.LayerNorm([f, SIDE, SIDE]))
    return Block(f, lambda net, x: net.core(x), core=nn.LayerNorm([PLACES, f]))


@_piece(SIMPLE)
def _dense_groups(f: int, a: int, b: int, c: int) -> Block:
    groups = 1 + a % 3
    core = nn.Linear(f, groups * (1 + b % 3))
    if c % 2:
        return Block(groups * groups, lambda net, x: _gram(net.core(x).unflatten(-1, (groups, -1))).flatten(2), core=core)
    return Block(groups, lambda net, x: _gram(net.core(x).unflatten(-1, (groups, -1))).softmax(-1).amax(-1), core=core)


def _gram(x: Tensor) -> Tensor:
    return x @ x.mT


@_piece(SIMPLE)
def _there_and_back(f: int, a: int, b: int, c: int) -> Block:
    if b % 2:
        return Block(f, lambda net, x: F.linear(F.linear(x, net.core).relu(), net.core.t()), core=parameter(a + 1, f))
    return Block(f, lambda net, x: torch.tanh(x @ net.core) @ net.core.mT, core=parameter(f, a + 1))


@_piece(HOLDING)
def _residual(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    core = chain(chains[0], f)
    if core.width == f and a % 3:
        return Block(f, lambda net, x: x + net.core(x), core=core)
    if core.width > f:
        before = b % (core.width - f + 1)
        return Block(core.width, lambda net, x: F.pad(x, (before, core.width - f - before)) + net.core(x), core=core)
    return Block(core.width, lambda net, x: net.short(x) + net.core(x), core=core, short=nn.Linear(f, core.width))


@_piece(HOLDING)
def _concatenated(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    left, right = chain(chains[0], f), chain(chains[1], f)
    if left.width == right.width and a % 3 == 0:  # side by side, unit by unit
        return Block(
            2 * left.width,
            lambda net, x: torch.stack([net.left(x), net.right(x)], b % 2 - 2).flatten(2),
            left=left,
            right=right,
        )
    return Block(
        left.width + right.width, lambda net, x: torch.cat([net.left(x), net.right(x)], -1), left=left, right=right
    )


@_piece(HOLDING)
def _gated(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    left, right = chain(chains[0], f), chain(chains[1], f)
    if left.width != right.width:
        right = nn.Sequential(right, nn.Linear(right.width, left.width if a % 2 else 1))
    function = [torch.mul, torch.add, torch.maximum][b % 3]
    return Block(left.width, lambda net, x: function(net.left(x), net.right(x)), left=left, right=right)


@_piece(HOLDING)
def _parted(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    if f == 1:
        return _residual(f, a, b, c, chains)
    size = 1 + a % (f - 1)
    left, right = chain(chains[0], size), chain(chains[1], f - size)

    def run(net: Any, x: Tensor) -> Tensor:
        one, other = x.split([size, f - size], -1)
        one, other = net.left(one), net.right(other)
        return torch.cat([one, other] if b % 2 else [other, one], -1)

    return Block(left.width + right.width, run, left=left, right=right)


@_piece(HOLDING)
def _shared(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    core = chain(chains[0], f)
    if core.width == f and a % 2:
        return Block(f, lambda net, x: net.core(torch.tanh(net.core(x))), core=core)
    if b % 2:
        return Block(2 * core.width, lambda net, x: torch.cat([net.core(x), net.core(x.tanh())], -1), core=core)
    return Block(core.width, lambda net, x: net.core(x) + net.core(net.other(x)), core=core, other=nn.Linear(f, f))


class Network(nn.Module):
    """The network of a plan; its example inputs are (2, PLACES) numbers of a table, or (2, PLACES, 3) values."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.stem = nn.Embedding(5, plan.width) if plan.stem == "table" else nn.Linear(3, plan.width)
        self.body = chain(plan.pieces, plan.width)
        if plan.head == "tied":
            self.neck = nn.Linear(self.body.width, plan.width)
            self.head = nn.Linear(plan.width, 5 if plan.stem == "table" else 3, bias=False)
            if plan.stem == "table":
                self.head.weight = self.stem.weight
        else:
            self.head = nn.Linear(self.body.width * (1 if plan.head == "mean" else PLACES), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        if self.plan.head == "tied":
            return self.head(self.neck(x))
        if self.plan.head == "mean":
            return self.head(x.mean(1))
        return self.head((x if self.plan.head == "flat" else x.transpose(1, 2)).flatten(1))

    def inputs(self) -> tuple[Tensor]:
        return (
            torch.arange(2 * PLACES).view(2, PLACES) % 5 if self.plan.stem == "table" else torch.randn(2, PLACES, 3),
        )


NUMBERS = st.tuples(*[st.integers(0, 5)] * 3)
SMALL = st.builds(Piece, st.sampled_from(sorted(SIMPLE)), NUMBERS)


def _holding(inside: st.SearchStrategy[Piece]) -> st.SearchStrategy[Piece]:
    chains = st.tuples(*[st.lists(inside, max_size=3).map(tuple)] * 2)
    return st.builds(Piece, st.sampled_from(sorted(HOLDING)), NUMBERS, chains)


PIECES = st.recursive(SMALL, _holding, max_leaves=5)
PLANS = st.builds(
    Plan,
    st.sampled_from(["values", "table"]),
    st.integers(1, 8),
    st.lists(PIECES, min_size=1, max_size=4).map(tuple),
    st.sampled_from(["mean", "flat", "channels", "tied"]),
)
