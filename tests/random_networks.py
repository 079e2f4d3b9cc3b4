"""Networks grown at random out of the pieces that tracing supports, for :mod:`test_random_networks`.

A plan is drawn by hypothesis and can be built whatever it says. Some pieces hold chains of pieces: branches that
are joined again, parts that go ways of their own, blocks that are used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import random_pieces_groups  # noqa: F401 - registers its pieces
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_pieces import PLACES, SIMPLE, Block, Builder, linear
from torch import Tensor, nn

WIDEST = 24
HOLDING: dict[str, Builder] = {}


@dataclass(frozen=True)
class Piece:
    """What one piece of a network does, its numbers, and the chains that it holds."""

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


def holding(builder: Builder) -> Builder:
    HOLDING[builder.__name__] = builder
    return builder


def chain(pieces: Sequence[Piece], width: int) -> nn.Sequential:
    """The pieces one after the other; what grows too wide is made narrow again."""
    found: list[Block] = []
    for each in pieces:
        builder = SIMPLE[each.kind] if each.kind in SIMPLE else HOLDING[each.kind]
        found.append(builder(width, *each.numbers, *([each.chains] if each.kind in HOLDING else [])))
        if found[-1].width > WIDEST:
            found.append(linear(found[-1].width, 4, 0, 0))
        width = found[-1].width
    result: Any = nn.Sequential(*found)
    result.width = width
    return result


@holding
def residual(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    core: Any = chain(chains[0], f)
    if core.width == f and a % 3:
        return Block(f, lambda net, x: x + net.core(x), core=core)
    if core.width > f:
        before = b % (core.width - f + 1)
        return Block(core.width, lambda net, x: F.pad(x, (before, core.width - f - before)) + net.core(x), core=core)
    return Block(core.width, lambda net, x: net.short(x) + net.core(x), core=core, short=nn.Linear(f, core.width))


@holding
def concatenated(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    left, right = chain(chains[0], f), chain(chains[1], f)
    width = left.width + right.width
    if left.width == right.width and a % 3 == 0:  # one half after the other, or unit by unit
        dim = b % 2 - 2
        return Block(
            width, lambda net, x: torch.stack([net.left(x), net.right(x)], dim).flatten(2), left=left, right=right
        )
    return Block(width, lambda net, x: torch.cat([net.left(x), net.right(x)], -1), left=left, right=right)


@holding
def gated(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    left, right = chain(chains[0], f), chain(chains[1], f)
    if left.width != right.width:
        right = nn.Sequential(right, nn.Linear(right.width, left.width if a % 2 else 1))
    function = [torch.mul, torch.add, torch.maximum][b % 3]
    return Block(left.width, lambda net, x: function(net.left(x), net.right(x)), left=left, right=right)


@holding
def parted(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    if f == 1:
        return residual(f, a, b, c, chains)
    size = 1 + a % (f - 1)
    left, right = chain(chains[0], size), chain(chains[1], f - size)

    def run(net: Any, x: Tensor) -> Tensor:
        one, other = x.split([size, f - size], -1)
        one, other = net.left(one), net.right(other)
        return torch.cat([one, other] if b % 2 else [other, one], -1)

    return Block(left.width + right.width, run, left=left, right=right)


@holding
def shared(f: int, a: int, b: int, c: int, chains: Any) -> Block:
    core: Any = chain(chains[0], f)
    if core.width == f and a % 2:
        return Block(f, lambda net, x: net.core(torch.tanh(net.core(x))), core=core)
    if b % 2:
        return Block(2 * core.width, lambda net, x: torch.cat([net.core(x), net.core(x.tanh())], -1), core=core)
    return Block(core.width, lambda net, x: net.core(x) + net.core(net.other(x)), core=core, other=nn.Linear(f, f))


class Network(nn.Module):
    """The network of a plan; it reads (2, PLACES) numbers of a table, or (2, PLACES, 3) values."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, self.table = plan, plan.stem == "table"
        self.stem = nn.Embedding(5, plan.width) if self.table else nn.Linear(3, plan.width)
        self.body: Any = chain(plan.pieces, plan.width)
        if plan.head == "tied":
            self.neck = nn.Linear(self.body.width, plan.width)
            self.head = nn.Linear(plan.width, 5 if self.table else 3, bias=False)
            if self.table:
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
        """A batch, the same for every plan."""
        numbers = torch.arange(2 * PLACES).view(2, PLACES)
        return (numbers % 5 if self.table else (numbers[..., None] * torch.tensor([1.0, 2.3, 0.7])).sin(),)


NUMBERS = st.tuples(*[st.integers(0, 5)] * 3)
SMALL = st.builds(Piece, st.sampled_from(sorted(SIMPLE)), NUMBERS)


def _held(inside: st.SearchStrategy[Piece]) -> st.SearchStrategy[Piece]:
    chains = st.tuples(*[st.lists(inside, max_size=3).map(tuple)] * 2)
    return st.builds(Piece, st.sampled_from(sorted(HOLDING)), NUMBERS, chains)


PIECES = st.recursive(SMALL, _held, max_leaves=5)
CHAINS = st.lists(PIECES, min_size=1, max_size=4).map(tuple)
PLANS = st.builds(
    Plan,
    st.sampled_from(["values", "table"]),
    st.integers(1, 8),
    CHAINS,
    st.sampled_from(["mean", "flat", "channels", "tied"]),
)
