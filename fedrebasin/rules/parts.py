"""Rules for parts of a tensor and tensors put side by side: slice, select, split, chunk, unbind, stack."""

from __future__ import annotations

from collections.abc import Sequence

from fedrebasin import axes
from fedrebasin.axes import Node, leaf, narrowed
from fedrebasin.axes.node import Kind, flatten, key_of, mentions
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule


def narrow(traced: Traced, value: Value, dim: int, start: int, length: int) -> Value:
    """The ``length`` indices from ``start`` along ``dim``."""
    traced.in_part = True
    axis = value.axes[dim].root
    if length == axis.size:
        return Value(list(value.axes))
    first, *inner = flatten(axis, Kind.PRODUCT)
    unit = axis.size // first.size
    if start % unit or length % unit:
        parts = axes.cut(axis, [start, length, axis.size - start - length])
        if parts is None:
            axes.fix(axis, "cut across units")
        return _with(value, dim, parts[1] if parts else leaf(length, "cut across units"))
    start, length, key = start // unit, length // unit, key_of(first)
    parts = axes.cut(first, [start, length, first.size - start - length])
    if parts is None:
        axes.fix(first, "cut across units")
    part = parts[1] if parts else leaf(length, "cut across units")
    kept = [narrowed(other, key, start, length, part) for other in value.axes]
    kept[dim] = axes.product([part, *(narrowed(factor, key, start, length, part) for factor in inner)])
    return Value(kept)


def select(traced: Traced, value: Value, dim: int, index: int) -> Value:
    """One index along ``dim``, whose axis is dropped."""
    dim %= len(value.axes)
    layers = value.axes[dim].root
    for axis in value.axes if layers.free_leaf else ():
        if axis.root is not layers and _only_beside(traced, axis.root, layers):
            axes.depend(axis, [layers])
    kept = narrow(traced, value, dim, index % value.axes[dim].size, 1)
    return Value([axis for other, axis in enumerate(kept.axes) if other != dim])


def _only_beside(traced: Traced, axis: Node, outer: Node) -> bool:
    """Whether each tensor so far that has ``axis`` has ``outer``, too: layers in one parameter, each with its order."""
    return all(
        any(mentions(other, outer) for other in tensor)
        for tensor in traced.tensors
        if any(mentions(other, axis) for other in tensor)
    )


def stack(traced: Traced, values: Sequence[Value], dim: int = 0) -> Value:
    """A new axis; each index along it has the axes of its own value."""
    del traced
    outer = leaf(len(values), "tensors side by side")
    result = [axes.family(outer, list(meeting)) for meeting in zip(*(value.axes for value in values), strict=True)]
    result.insert(dim % (len(result) + 1), outer)
    return Value(result)


rule("select")(select)
rule("stack")(stack)


@rule("narrow")
def narrow_rule(traced: Traced, x: Value, dim: int, start: int, length: int) -> Value:
    """A range of indices."""
    dim %= len(x.axes)
    return narrow(traced, x, dim, start % x.axes[dim].size if start < 0 else start, length)


@rule("slice")
def slice_(
    traced: Traced, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    """A range, or every ``step``-th index."""
    dim %= len(x.axes)
    size = x.axes[dim].size
    start, end, _ = slice(start, end).indices(size)
    length = traced.output_shapes[0][dim]
    if step == 1 or length == 0:
        return narrow(traced, x, dim, start, length) if length else _with(x, dim, leaf(0, "empty"))
    pair = axes.split(x.axes[dim], [size // step, step]) if size % step == 0 and length == size // step else None
    if pair is None or start >= step:
        axes.fix(x.axes[dim], "every second unit, or the like")
        return _with(x, dim, leaf(length, "every second unit, or the like"))
    grid = Value([*x.axes[:dim], *pair, *x.axes[dim + 1 :]])
    return select(traced, grid, dim + 1, start)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split")
def split(traced: Traced, x: Value, sizes: int | Sequence[int], dim: int = 0) -> list[Value]:
    """Ranges that follow each other; ``sizes`` may be a size, a number of parts, or all sizes."""
    del sizes
    if not x.axes:
        raise NotCoveredError
    dim %= len(x.axes)
    result, start = [], 0
    for shape in traced.output_shapes:
        result.append(narrow(traced, x, dim, start, shape[dim]) if shape[dim] else _with(x, dim, leaf(0, "empty")))
        start += shape[dim]
    return result


@rule("unbind")
def unbind(traced: Traced, x: Value, dim: int = 0) -> list[Value]:
    """Every index along ``dim`` by itself."""
    return [select(traced, x, dim, index) for index in range(x.axes[dim].size)]


def _with(value: Value, dim: int, axis: Node) -> Value:
    return Value([axis if other == dim else kept for other, kept in enumerate(value.axes)])
