"""Rules for ops that reduce an axis, or whose result depends on the order along one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, overload

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.rules.pointwise import pointwise
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule

_ORDER = "positions along an axis"


class _ValuesAndPositions(tuple[Value, ...]):
    """(values, positions along ``axis``): whoever takes the positions fixes the axis."""

    axis: Node

    @overload
    def __getitem__(self, index: SupportsIndex) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Value, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        """The values, or the positions."""
        if index != 0:
            axes.fix(self.axis, _ORDER)
        return tuple(self)[index]


def dims_of(x: Value, dim: Any) -> set[int]:
    """The reduced dimensions; all of them where ``dim`` names none."""
    if dim is None or isinstance(dim, bool) or (isinstance(dim, Sequence) and not dim) or not x.axes:
        return set(range(len(x.axes)))
    return {d % len(x.axes) for d in ([dim] if isinstance(dim, int) else dim)}


def reduced(traced: Traced, x: Value, dims: set[int]) -> list[Node]:
    """The axes that are left; the op's output shape says whether reduced ones stay with size 1."""
    if len(traced.output_shapes[0]) == len(x.axes):
        return [leaf(1) if d in dims else axis for d, axis in enumerate(x.axes)]
    return [axis for d, axis in enumerate(x.axes) if d not in dims]


@rule("mean", "sum", "nansum", "nanmean", "amax", "amin", "prod", "var", "std", "logsumexp", "all", "any")
@rule("count_nonzero", "special_logsumexp", "_is_all_true", "_is_any_true")
def reduction(traced: Traced, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    """A permutation of a reduced axis changes nothing."""
    return Value(reduced(traced, x, dims_of(x, dim)))


@rule("norm", "linalg_vector_norm")
def norm(traced: Traced, x: Value, order: Any = 2, dim: Any = None, *_: Any, **__: Any) -> Value:
    """A reduction; its order comes before its dimensions."""
    del order
    return Value(reduced(traced, x, dims_of(x, dim)))


@rule("linalg_norm")
def linalg_norm(traced: Traced, x: Value, order: Any = None, dim: Any = None, *_: Any, **__: Any) -> Value:
    """As a vector norm; norms of matrices, too, do not depend on the order of rows and columns."""
    del order
    return Value(reduced(traced, x, dims_of(x, dim)))


@rule("var_mean", "std_mean", "aminmax")
def two_reductions(traced: Traced, x: Value, dim: Any = None, *_: Any, **__: Any) -> tuple[Value, Value]:
    """Two reductions over the same axes."""
    result = reduced(traced, x, dims_of(x, dim))
    return Value(result), Value(list(result))


@rule("max", "min")
def extremum(traced: Traced, x: Value, other: Any = None, *_: Any, **__: Any) -> Any:
    """Of all entries, of two tensors, or along one axis with the positions there."""
    if isinstance(other, Value):
        return pointwise(traced, x, other)
    if other is None:
        return Value([])
    return _along(traced, x, other)


@rule("median", "nanmedian", "mode")
def median(traced: Traced, x: Value, dim: int | None = None, *_: Any, **__: Any) -> Any:
    """Of all entries, or along one axis with the positions there."""
    if len(traced.output_shapes) == 1:
        return Value([])
    return _along(traced, x, -1 if dim is None else dim)


@rule("kthvalue")
def kth_value(traced: Traced, x: Value, k: int, dim: int = -1, *_: Any, **__: Any) -> Any:
    """The k-th smallest along an axis, with its position."""
    del k
    return _along(traced, x, dim)


def _along(traced: Traced, x: Value, dim: int) -> _ValuesAndPositions:
    result = reduced(traced, x, dims_of(x, dim))
    found = _ValuesAndPositions((Value(result), Value(list(result))))
    found.axis = x.axes[dim] if x.axes else leaf(1)
    return found


@rule("argmax", "argmin")
def position(traced: Traced, x: Value, dim: int | None = None, *_: Any, **__: Any) -> Value:
    """Positions along an axis, or in the flattened tensor."""
    dims = dims_of(x, dim)
    for d in dims:
        axes.fix(x.axes[d], _ORDER)
    return Value(reduced(traced, x, dims))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(traced: Traced, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    """Entries along ``dim`` share a sum, whatever their order."""
    traced.within(axis for d, axis in enumerate(x.axes) if d not in dims_of(x, dim))
    return Value(list(x.axes))


@rule("cumsum", "cumprod", "logcumsumexp", "flip")
def ordered(traced: Traced, x: Value, dim: Any, *_: Any, **__: Any) -> Value:
    """The order along ``dim`` counts; the other axes are free."""
    del traced
    for d in dims_of(x, dim):
        axes.fix(x.axes[d], _ORDER)
    return Value(list(x.axes))


@rule("cummax", "cummin")
def ordered_extremum(traced: Traced, x: Value, dim: int) -> tuple[Value, Value]:
    """The order along ``dim`` counts; values and positions."""
    result = ordered(traced, x, dim)
    return result, Value(list(result.axes))


@rule("roll")
def roll(traced: Traced, x: Value, shifts: Any, dims: Any = ()) -> Value:
    """Positions along ``dims`` move in a circle."""
    del shifts
    return ordered(traced, x, dims)


@rule("triu", "tril")
def triangle(traced: Traced, x: Value, *_: Any) -> Value:
    """Rows and columns are compared by their places."""
    return ordered(traced, x, (-2, -1))


@rule("diff")
def difference(traced: Traced, x: Value, n: int = 1, dim: int = -1, *more: Any, **keywords: Any) -> Value:
    """Neighbours along ``dim`` are subtracted."""
    if any(isinstance(value, Value) for value in (*more, *keywords.values())):
        raise NotCoveredError
    del n
    result = list(ordered(traced, x, dim).axes)
    result[dim] = leaf(traced.output_shapes[0][dim], _ORDER)
    return Value(result)


@rule("sort")
def sort(traced: Traced, x: Value, *arguments: Any, **keywords: Any) -> _ValuesAndPositions:
    """Sorted values do not depend on the order along the axis, their positions do."""
    numbers = [argument for argument in arguments if isinstance(argument, int) and not isinstance(argument, bool)]
    return _ranked(traced, x, keywords.get("dim", numbers[0] if numbers else -1))


@rule("topk")
def top(traced: Traced, x: Value, k: int, dim: int = -1, *_: Any, **__: Any) -> _ValuesAndPositions:
    """As ``sort``, the first ``k``."""
    del k
    return _ranked(traced, x, dim)


def _ranked(traced: Traced, x: Value, dim: int) -> _ValuesAndPositions:
    result = list(x.axes)
    if result:
        result[dim] = leaf(traced.output_shapes[0][dim], "rank")
    found = _ValuesAndPositions((Value(result), Value(list(result))))
    found.axis = x.axes[dim] if x.axes else leaf(1)
    return found


@rule("argsort")
def argsort(traced: Traced, x: Value, *arguments: Any, **keywords: Any) -> Value:
    """The positions of ``sort``."""
    return sort(traced, x, *arguments, **keywords)[1]


@rule("cross", "linalg_cross")
def cross(traced: Traced, a: Value, b: Value, dim: int | None = None) -> Value:
    """Elementwise but for the axis of three."""
    result = pointwise(traced, a, b)
    named = [-1 if dim is None else dim] if dim is not None else range(len(result.axes))
    for d in named:
        if result.axes[d].size == 3:
            axes.fix(result.axes[d], "cross product")
    return result


@rule("glu")
def glu(traced: Traced, x: Value, dim: int = -1) -> Value:
    """Two halves side by side that meet unit by unit."""
    half = x.axes[dim].size // 2
    halves = traced.cut(x.axes[dim], [half, half])
    result = list(x.axes)
    result[dim] = traced.tie(*halves)
    return Value(result)
