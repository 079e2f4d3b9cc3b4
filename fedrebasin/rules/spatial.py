"""Rules for ops over positions: pooling, resampling, padding, windows, shuffles of pixels and channels.

Channels stay apart and may be permuted; positions are neighbours of each other and are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.rules.parts import narrow
from fedrebasin.rules.pointwise import pointwise
from fedrebasin.rules.registry import NotCoveredError, Rule, Traced, Value, rule
from fedrebasin.rules.windows import SPATIAL, apart, each, positions


def _fixed(sizes: Sequence[int]) -> list[Node]:
    return [leaf(size, SPATIAL) for size in sizes]


def _positions(spatial: int) -> Rule:
    """The rule for an op over the last ``spatial`` axes."""

    def over_all(traced: Traced, x: Value, *_: Any, **__: Any) -> Any:
        """Values and, from some pools, positions, each (*batch, channel, *spatial)."""
        kept = len(x.axes) - spatial
        for axis in x.axes[kept:]:
            axes.fix(axis, SPATIAL)
        results = [Value([*x.axes[:kept], *_fixed(shape[kept:])]) for shape in traced.output_shapes]
        return results[0] if len(results) == 1 else tuple(results)

    return over_all


def _pool(spatial: int) -> Rule:
    """The rule for a pool of values over the last ``spatial`` axes."""

    def pool(traced: Traced, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, *_: Any, **__: Any) -> Value:
        """(*batch, channel, *spatial); an axis along which the window holds one position is a batch axis."""
        windows, before = each(kernel, spatial), len(x.axes) - spatial
        kept = apart(windows, stride or windows, padding)
        return Value([*x.axes[:before], *positions(x.axes[before:], traced.output_shapes[0][before:], kept)])

    return pool


def _adaptive(spatial: int) -> Rule:
    """The rule for a mean over as many windows as asked for: where these are all positions, each holds one."""

    def adaptive(traced: Traced, x: Value, *_: Any) -> Value:
        """(*batch, channel, *spatial)."""
        before, shape = len(x.axes) - spatial, traced.output_shapes[0]
        kept = [size == axis.size for size, axis in zip(shape[before:], x.axes[before:], strict=True)]
        return Value([*x.axes[:before], *positions(x.axes[before:], shape[before:], kept)])

    return adaptive


for _spatial in (1, 2, 3):
    rule(f"max_pool{_spatial}d", f"avg_pool{_spatial}d")(_pool(_spatial))
    rule(f"adaptive_avg_pool{_spatial}d", f"_adaptive_avg_pool{_spatial}d")(_adaptive(_spatial))
    for _kind in ("max_pool{}d_with_indices", "adaptive_max_pool{}d"):  # these number the positions of all axes
        rule(_kind.format(_spatial))(_positions(_spatial))
    for _kind in ("replication_pad{}d", "reflection_pad{}d"):
        rule(_kind.format(_spatial))(_positions(_spatial))


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
@rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
@rule("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def resampled(traced: Traced, x: Value, size: Any, *more: Any) -> Value:
    """(batch, channel, *spatial), by ``size`` or by factors, the last argument; the same size keeps every entry.

    A factor near 1 may give the same size and other entries.
    """
    shape = traced.output_shapes[0]
    factors = more[-1] if more and isinstance(more[-1], list | tuple) else [1.0] * (len(shape) - 2)
    told = not any(isinstance(one, float) for one in more)
    pairs = zip(shape[2:], x.axes[2:], factors, strict=True)
    kept = [told and new == axis.size and factor == 1 for new, axis, factor in pairs]
    del size
    return Value([*x.axes[:2], *positions(x.axes[2:], shape[2:], kept)])


def _unpool(spatial: int) -> Rule:
    """The rule for the inverse of a pool: where each value belongs is a position within its channel."""

    def unpool(traced: Traced, x: Value, places: Value, *_: Any, **__: Any) -> Any:
        """Values and their places, both (*batch, channel, *spatial)."""
        return _positions(spatial)(traced, pointwise(traced, x, places))

    return unpool


for _spatial in (2, 3):
    rule(f"max_unpool{_spatial}d")(_unpool(_spatial))


@rule("constant_pad_nd")
def constant_pad(traced: Traced, x: Value, amounts: Sequence[int], *_: Any, **__: Any) -> Value:
    """Equal entries beside the axis tie nothing, so it becomes a sum of padding, axis, padding."""

    for back, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), 1):
        result = list(x.axes)
        if before < 0 or after < 0:
            start, end = max(0, -before), result[-back].size - max(0, -after)
            result = narrow(traced, x, len(result) - back, start, end - start).axes
        result[-back] = _pad(result[-back], max(0, before), max(0, after))
        x = Value(result)
    return x


def _pad(axis: Node, before: int, after: int) -> Node:
    reasons = [end.reason for end in axes.leaves(axis)]
    if reasons and all(reasons):  # a fixed axis stays one leaf
        return leaf(before + axis.size + after, reasons[0]) if before + after else axis
    return axes.concat([leaf(before), axis, leaf(after)])


@rule("pad")
def pad(traced: Traced, x: Value, amounts: Sequence[int], mode: str = "constant", *_: Any, **__: Any) -> Value:
    """With a constant, or from the axis itself, where positions count."""
    if mode == "constant":
        return constant_pad(traced, x, amounts)
    result = list(x.axes)
    for back in range(1, len(amounts) // 2 + 1):
        if not any(amounts[2 * back - 2 : 2 * back]):
            continue
        axes.fix(result[-back], SPATIAL)
        result[-back] = leaf(traced.output_shapes[0][-back], SPATIAL)
    return Value(result)


@rule("pixel_shuffle")
def pixel_shuffle(traced: Traced, x: Value, factor: int) -> Value:
    """(*batch, channel x factor x factor, height, width) to (*batch, channel, height x factor, width x factor)."""
    channel, *offsets = traced.split(x.axes[-3], [x.axes[-3].size // factor**2, factor, factor])
    for axis in (*offsets, *x.axes[-2:]):
        axes.fix(axis, SPATIAL)
    return Value([*x.axes[:-3], channel, *_fixed(traced.output_shapes[0][-2:])])


@rule("pixel_unshuffle")
def pixel_unshuffle(traced: Traced, x: Value, factor: int) -> Value:
    """The inverse of ``pixel_shuffle``."""
    for axis in x.axes[-2:]:
        axes.fix(axis, SPATIAL)
    channel = axes.product([x.axes[-3], *_fixed([factor, factor])])
    return Value([*x.axes[:-3], channel, *_fixed(traced.output_shapes[0][-2:])])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(traced: Traced, x: Value, groups: int) -> Value:
    """Channels (groups, rest) become (rest, groups)."""
    outer, inner = traced.split(x.axes[1], [groups, x.axes[1].size // groups])
    return Value([x.axes[0], axes.product([inner, outer]), *x.axes[2:]])


@rule("im2col")
def windows_to_columns(traced: Traced, x: Value, kernel: Sequence[int], *_: Any, **__: Any) -> Value:
    """(*batch, channel, height, width) to (*batch, channel x kernel, windows)."""
    for axis in x.axes[-2:]:
        axes.fix(axis, SPATIAL)
    window = axes.product([x.axes[-3], *_fixed([math.prod(kernel)])])
    return Value([*x.axes[:-3], window, *_fixed(traced.output_shapes[0][-1:])])


@rule("col2im")
def columns_to_image(traced: Traced, x: Value, size: Any, kernel: Sequence[int], *_: Any, **__: Any) -> Value:
    """(*batch, channel x kernel, windows) to (*batch, channel, height, width)."""
    del size
    channel, window = traced.split(x.axes[-2], [x.axes[-2].size // math.prod(kernel), math.prod(kernel)])
    for axis in (window, x.axes[-1]):
        axes.fix(axis, SPATIAL)
    return Value([*x.axes[:-2], channel, *_fixed(traced.output_shapes[0][-2:])])


@rule("unfold")
def unfold(traced: Traced, x: Value, dim: int, size: int, step: int) -> Value:
    """Windows along ``dim``; the positions within each come last."""
    del step
    if not x.axes:
        raise NotCoveredError
    dim %= len(x.axes)
    axes.fix(x.axes[dim], SPATIAL)
    return Value([*x.axes[:dim], *_fixed([traced.output_shapes[0][dim]]), *x.axes[dim + 1 :], *_fixed([size])])


@rule("torchvision.roi_align", "torchvision.roi_pool")
def regions(traced: Traced, x: Value, boxes: Value, *_: Any, **__: Any) -> Any:
    """(batch, channel, *spatial) read within boxes is (box, channel, *positions), from ``roi_pool`` twice."""
    traced.fix(boxes, SPATIAL)
    for axis in (x.axes[0], *x.axes[2:]):
        axes.fix(axis, SPATIAL)
    results = [Value([*_fixed(shape[:1]), x.axes[1], *_fixed(shape[2:])]) for shape in traced.output_shapes]
    return results[0] if len(results) == 1 else tuple(results)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(traced: Traced, x: Value, grid: Value, *_: Any, **__: Any) -> Value:
    """(batch, channel, *spatial) read at (batch, *points, coordinate) is (batch, channel, *points)."""
    for axis in (*x.axes[2:], grid.axes[-1]):
        axes.fix(axis, SPATIAL)
    return Value([traced.tie(x.axes[0], grid.axes[0]), x.axes[1], *grid.axes[1:-1]])


@rule("affine_grid_generator")
def affine_grid(traced: Traced, theta: Value, *_: Any, **__: Any) -> Value:
    """A matrix for each of the batch gives (batch, *points, coordinate)."""
    for axis in theta.axes[1:]:
        axes.fix(axis, SPATIAL)
    return Value([theta.axes[0], *_fixed(traced.output_shapes[0][1:])])
