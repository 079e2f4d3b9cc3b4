"""Rules for ops that join, regroup or reorder axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.axes.families import all_below
from fedrebasin.axes.node import Kind, flatten
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule


@rule("cat", "concat", "concatenate")
def concatenate(traced: Traced, values: Sequence[Value], dim: int = 0) -> Value:
    """The axis of concatenation is the sum of its parts' axes."""
    values = [value for value in values if value.shape != (0,)]
    if not values:
        raise NotCoveredError
    dim %= len(values[0].axes)
    for other, meeting in enumerate(zip(*(value.axes for value in values), strict=True)):
        if other != dim:
            traced.tie(*meeting)
    result = list(values[0].axes)
    result[dim] = axes.concat([value.axes[dim] for value in values])
    return Value(result)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def regroup(traced: Traced, x: Value, *_: Any, **__: Any) -> Value:
    """Axes are joined into products and products split into axes."""
    shape = traced.output_shapes[0]
    if 0 in shape:
        raise NotCoveredError
    sources = [axis for axis in x.axes if axis.size != 1]
    targets = [size for size in shape if size != 1]
    found: list[Node] = []
    while sources:
        joined, sizes = [sources.pop(0)], [targets.pop(0)]
        have, want = joined[0].size, sizes[0]
        while have != want:
            if have < want:
                joined.append(sources.pop(0))
                have *= joined[-1].size
            else:
                sizes.append(targets.pop(0))
                want *= sizes[-1]
        found += _resplit(joined, sizes, x.axes)
    return Value([leaf(1) if size == 1 else found.pop(0) for size in shape])


def _resplit(joined: list[Node], sizes: list[int], everything: list[Node]) -> list[Node]:
    if all(map(axes.is_fixed, joined)):
        whole = axes.product(joined)
        outer = {node.over.root for node in all_below(everything) if node.over is not None}
        kept = axes.split(whole, sizes) if not outer.isdisjoint(flatten(whole, Kind.PRODUCT)) else None
        return kept or [leaf(size, axes.reason_of(whole)) for size in sizes]
    for dim in range(1, len(joined)):  # an inner factor may depend on the outer ones until some tensor shows otherwise
        axes.depend(joined[dim], [outer for outer in joined[:dim] if not axes.is_fixed(outer)])
    parts = axes.split(axes.product(joined), sizes)
    if parts is not None:
        return parts
    for axis in joined:
        axes.fix(axis, "a view that cuts across units")
    return [leaf(size, "a view that cuts across units") for size in sizes]


@rule("permute")
def permute(traced: Traced, x: Value, dims: Sequence[int]) -> Value:
    """Axes in another order."""
    del traced
    return Value([x.axes[dim] for dim in dims])


@rule("transpose", "swapaxes", "t", "numpy_T")
def transpose(traced: Traced, x: Value, first: int = 0, second: int = -1) -> Value:
    """Two axes change places."""
    del traced
    result = list(x.axes)
    if len(result) > 1:
        result[first], result[second] = result[second], result[first]
    return Value(result)


@rule("expand", "expand_as", "broadcast_to")
def expand(traced: Traced, x: Value, *_: Any, **__: Any) -> Value:
    """An axis of size 1 is repeated: its copies are equal, so any order keeps them."""
    shape = traced.output_shapes[0]
    known = [None] * (len(shape) - len(x.axes)) + list(x.axes)
    return Value(
        [
            axis if axis is not None and axis.size == size else leaf(size)
            for axis, size in zip(known, shape, strict=True)
        ]
    )
