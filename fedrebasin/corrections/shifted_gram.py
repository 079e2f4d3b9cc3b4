"""The Gram matrix of an unfolded convolution input from fewer products: windows that are shifted overlap.

Letters: ``o``, ``u`` taps of the kernel; ``p`` a place of the output; ``x_o`` (in, samples) what tap ``o`` meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import gcd

import torch
from torch import Tensor

from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.normal_equations import gram_product

#: With fewer input channels than this, the blocks are too small to be worth more products.
_CHANNELS = 32

Tap = tuple[int, ...]


def unfolded_gram(layer: Layer, X: Tensor, kernel: Sequence[int], places: Sequence[int]) -> Tensor:
    """``X @ X.T`` of an input unfolded by :func:`~fedrebasin.corrections.linear_maps.columns`.

    The block of the taps ``o`` and ``u`` is ``sum_p x[p + o] x[p + u]^T``. Both taps moved by as much as the output
    moves by ``lines`` places give the same sum over a window that has lost some lines at one side and gained as
    many at the other, so that such a block costs two thin products.

    Parameters
    ----------
    X : Tensor, shape (in * kernel, n * places)
    kernel, places : sequence of int
        Spatial axes of the weight and of the layer's output; empty for a linear layer.

    Returns
    -------
    Tensor, shape (in * kernel, in * kernel), of the dtype of ``X``

    Examples
    --------
    >>> layer = Layer("w", None, None, frozenset(), stride=(1,), padding=((0, 0),), dilation=(1,))
    >>> unfolded_gram(layer, torch.tensor([[1.0, 2.0], [2.0, 3.0]]), (2,), (2,))
    tensor([[ 5.,  8.],
            [ 8., 13.]])
    """
    taps = list(product(*map(range, kernel)))
    channels = len(X) // max(1, len(taps))
    moves = list(_moves(layer, kernel, places))
    if channels < _CHANNELS or not moves:
        return gram_product(X)
    return _from_blocks(X.view(channels, len(taps), -1, *places), taps, moves)


def _moves(layer: Layer, kernel: Sequence[int], places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Axis, taps and lines of the moves that pay."""
    for axis, (size, count) in enumerate(zip(kernel, places, strict=True)):
        stride, gap = layer.stride[axis], layer.dilation[axis]
        step = stride // gcd(stride, gap)
        lines = step * gap // stride
        if step < size and 4 * lines <= count:  # two products, each at most a quarter of the whole one
            yield axis, step, lines


def _from_blocks(views: Tensor, taps: list[Tap], moves: list[tuple[int, int, int]]) -> Tensor:
    channels, count = views.shape[:2]
    blocks = views.new_empty(count, count, channels, channels)
    number = {tap: place for place, tap in enumerate(taps)}
    borders: dict[tuple[int, int, bool], Tensor] = {}

    def border(tap: int, axis: int, lines: int, *, last: bool) -> Tensor:
        key = (tap, axis, last)
        if key not in borders:
            size = views.shape[3 + axis]
            borders[key] = views[:, tap].narrow(2 + axis, size - lines if last else 0, lines).flatten(1)
        return borders[key]

    for o, first in enumerate(taps):
        rows = views[:, o].flatten(1)
        for u in range(o, count):
            found = _before(first, taps[u], moves)
            if found is None:
                torch.mm(rows, views[:, u].flatten(1).T, out=blocks[o, u])
            else:
                axis, step, lines = found
                a, b = (number[_moved(tap, axis, -step)] for tap in (first, taps[u]))
                blocks[o, u].copy_(blocks[a, b])
                blocks[o, u].addmm_(border(o, axis, lines, last=True), border(u, axis, lines, last=True).T)
                blocks[o, u].addmm_(border(a, axis, lines, last=False), border(b, axis, lines, last=False).T, alpha=-1)
            if u > o:
                blocks[u, o] = blocks[o, u].T
    return blocks.permute(2, 0, 3, 1).reshape(channels * count, channels * count)


def _before(o: Tap, u: Tap, moves: list[tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """A move that leads to these taps from two others."""
    return next((move for move in moves if min(o[move[0]], u[move[0]]) >= move[1]), None)


def _moved(tap: Tap, axis: int, step: int) -> Tap:
    return (*tap[:axis], tap[axis] + step, *tap[axis + 1 :])
