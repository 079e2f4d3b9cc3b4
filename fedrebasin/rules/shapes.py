"""Rules for ops that reduce, join, split or reorder axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule


@rule("mean", "sum", "amax", "amin")
def reduction(traced: Traced, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    """A permutation of a reduced axis changes nothing."""
    del traced
    if isinstance(dim, int):
        dim = [dim]
    dims = {d % len(x.axes) for d in dim} if dim else set(range(len(x.axes)))
    if keepdim:
        return Value([leaf(1) if d in dims else axis for d, axis in enumerate(x.axes)])
    return Value([axis for d, axis in enumerate(x.axes) if d not in dims])


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(traced: Traced, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    """Entries along ``dim`` share a sum, whatever their order."""
    traced.within(axis for d, axis in enumerate(x.axes) if d != dim % len(x.axes))
    return Value(list(x.axes))


@rule("cat", "concat", "concatenate")
def concatenate(traced: Traced, values: Sequence[Value], dim: int = 0) -> Value:
    """The axis of concatenation is the sum of its parts' axes."""
    values = [value for value in values if value.shape != (0,)]
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
        found += _resplit(joined, sizes)
    return Value([leaf(1) if size == 1 else found.pop(0) for size in shape])


def _resplit(joined: list[Node], sizes: list[int]) -> list[Node]:
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
