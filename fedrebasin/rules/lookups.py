"""Rules for reading and writing by number, and for repeats.

An axis that is looked up by number is a table: its order counts. The others may be permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.rules.parts import narrow, select
from fedrebasin.rules.pointwise import pointwise
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule

_TABLE, _MASK = "table", "places in a row, by a mask"


@rule("embedding")
def embedding(traced: Traced, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    """Rows are looked up by number, so only the columns may be permuted."""
    del traced
    axes.fix(weight.axes[0], _TABLE)
    return Value([*indices.axes, weight.axes[1]])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    traced: Traced,
    weight: Value,
    indices: Value,
    offsets: Value,
    scale: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: Value | None = None,
    *_: Any,
) -> tuple[Value, ...]:
    """Rows are looked up and summed in bags; where each bag begins is a number, too."""
    del scale, mode, sparse
    axes.fix(weight.axes[0], _TABLE)
    for value in (indices, offsets, weights):
        if value is not None:
            traced.fix(value, _TABLE)
    return tuple(
        Value([leaf(size, _TABLE) for size in shape[:1]] + [weight.axes[1]] * (len(shape) - 1))
        for shape in traced.output_shapes
    )


@rule("index", "_unsafe_index")
def index(traced: Traced, x: Value, indices: Sequence[Value | None]) -> Value:
    """``x[indices]``: tables are read at points, whose axes stand where the tables were if these are neighbours."""
    if not traced.masks:
        return _points(traced, x, indices)
    before, covered, after = _under_mask(traced, x, indices)
    for axis in covered:
        axes.fix(axis, _MASK)
    return Value([*before, leaf(traced.output_shapes[0][len(before)], _MASK), *after])


def _under_mask(traced: Traced, x: Value, indices: Sequence[Value | None]) -> tuple[list[Node], list[Node], list[Node]]:
    """The axes of ``x`` before those that a mask of booleans covers, these, which are the mask's own, and the rest."""
    masks = [(dim, value) for dim, value in enumerate(indices) if value is not None]
    if len(masks) > 1:
        raise NotCoveredError
    ((dim, mask),) = masks
    end = dim + len(mask.axes)
    return x.axes[:dim], [traced.tie(*pair) for pair in zip(x.axes[dim:end], mask.axes, strict=True)], x.axes[end:]


def _points(traced: Traced, x: Value, indices: Sequence[Value | None]) -> Value:
    tables = {dim: value for dim, value in enumerate(indices) if value is not None}
    if len(indices) > len(x.axes) or not tables:
        raise NotCoveredError
    for dim in tables:
        axes.fix(x.axes[dim], _TABLE)
    points = pointwise(traced, *tables.values()).axes
    first, last = min(tables), max(tables)
    at = first if last - first + 1 == len(tables) else 0
    rest = [axis for dim, axis in enumerate(x.axes) if dim not in tables]
    return Value([*rest[:at], *points, *rest[at:]])


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(traced: Traced, x: Value, indices: Sequence[Value | None], values: Value, *_: Any, **__: Any) -> Value:
    """``x[indices] = values``."""
    if traced.masks:
        before, covered, after = _under_mask(traced, x, indices)
        count = values.shape[-1 - len(after)] if len(values.axes) > len(after) else 1
        for axis in covered if count > 1 else ():  # values go to their places in a row
            axes.fix(axis, _MASK)
        pointwise(traced, Value([*before, leaf(count, _MASK if count > 1 else ""), *after]), values)
        return Value(list(x.axes))
    target = _points(traced, x, indices)
    if len(values.axes) > len(target.axes) or any(
        size not in (1, axis.size) for size, axis in zip(values.shape[::-1], target.axes[::-1], strict=False)
    ):
        raise NotCoveredError
    pointwise(traced, target, values)
    return Value(list(x.axes))


@rule("index_select")
def index_select(traced: Traced, x: Value, dim: int, points: Value) -> Value:
    """One axis is a table."""
    del traced
    result = list(x.axes)
    if result:
        axes.fix(result[dim], _TABLE)
        result[dim] = points.axes[0] if points.axes else leaf(1)
    return Value(result)


@rule("gather")
def gather(traced: Traced, x: Value, dim: int, points: Value, **_: Any) -> Value:
    """Along one axis a table for every index of the others."""
    _meet_but(traced, x, points, dim)
    return Value(list(points.axes))


@rule("take_along_dim")
def take_along_dim(traced: Traced, x: Value, points: Value, dim: int | None = None) -> Value:
    """As ``gather``; the other axes broadcast."""
    if dim is None or len(x.axes) != len(points.axes):
        raise NotCoveredError
    axes.fix(x.axes[dim], _TABLE)
    one, other = list(x.axes), list(points.axes)
    one[dim], other[dim] = leaf(1), leaf(1)
    result = pointwise(traced, Value(one), Value(other)).axes
    result[dim] = points.axes[dim]
    return Value(result)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(traced: Traced, x: Value, dim: int, points: Value, source: Any = None, *_: Any, **keywords: Any) -> Value:
    """Along one axis a table is written for every index of the others."""
    _meet_but(traced, x, points, dim)
    source = keywords.get("src", source)
    if isinstance(source, Value) and source.axes:
        if source.shape != points.shape:
            raise NotCoveredError
        pointwise(traced, source, points)
    return Value(list(x.axes))


def _meet_but(traced: Traced, x: Value, points: Value, dim: int) -> None:
    """Tie all axes but the table's."""
    if len(x.axes) != len(points.axes) or not x.axes:
        raise NotCoveredError
    for d, (axis, other) in enumerate(zip(x.axes, points.axes, strict=True)):
        if d == dim % len(x.axes):
            axes.fix(axis, _TABLE)
        elif axis.size == other.size:
            traced.tie(axis, other)
        else:
            raise NotCoveredError


@rule("one_hot")
def one_hot(traced: Traced, x: Value, *_: Any) -> Value:
    """The new last axis is a table."""
    return Value([*x.axes, leaf(traced.output_shapes[0][-1], _TABLE)])


@rule("copy")
def copy(traced: Traced, x: Value, source: Value, *_: Any) -> Value:
    """``x`` is overwritten with ``source``, which broadcasts."""
    pointwise(traced, x, source)
    return Value(list(x.axes))


@rule("fill", "zero")
def fill(traced: Traced, x: Value, *_: Any) -> Value:
    """``x`` is overwritten with one number."""
    del traced
    return Value(list(x.axes))


@rule("slice_scatter")
def slice_scatter(
    traced: Traced, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """``x`` with a slice overwritten by ``source``."""

    del end
    if step != 1:
        raise NotCoveredError
    start = 0 if start is None else start + x.axes[dim].size * (start < 0)
    pointwise(traced, narrow(traced, x, dim, start, source.axes[dim].size), source)
    return Value(list(x.axes))


@rule("select_scatter")
def select_scatter(traced: Traced, x: Value, source: Value, dim: int, position: int) -> Value:
    """``x`` with one index of an axis overwritten by ``source``."""

    pointwise(traced, select(traced, x, dim, position), source)
    return Value(list(x.axes))


@rule("repeat", "tile")
def repeat(traced: Traced, x: Value, counts: Sequence[int]) -> Value:
    """Equal copies, one after the other: any order of the copies keeps them."""
    del traced
    ndim = max(len(counts), len(x.axes))
    known = [leaf(1) for _ in range(ndim - len(x.axes))] + x.axes
    times = [1] * (ndim - len(counts)) + list(counts)
    return Value([_copies(count, [leaf(count), axis]) for count, axis in zip(times, known, strict=True)])


@rule("repeat_interleave")
def repeat_interleave(traced: Traced, x: Value, count: Any, dim: int | None = None, **_: Any) -> Value:
    """Equal copies of every unit beside it; with a number of copies for each unit, their places count."""
    if isinstance(count, Value) and dim is not None and count.axes:
        for axis in (x.axes[dim], count.axes[0]):
            axes.fix(axis, _TABLE)
        result = list(x.axes)
        result[dim] = leaf(traced.output_shapes[0][dim], _TABLE)
        return Value(result)
    if not isinstance(count, int):
        raise NotCoveredError
    if dim is None:
        return Value([_copies(count, [*x.axes, leaf(count)])])
    result = list(x.axes)
    outer = result[dim].root
    copies = [leaf(count) for _ in range(outer.size)] if outer.free_leaf else [leaf(count)]
    result[dim] = _copies(count, [outer, axes.family(outer, copies)])
    return Value(result)


def _copies(count: int, factors: list[Node]) -> Node:
    if count == 0:
        raise NotCoveredError
    return axes.product(factors)
