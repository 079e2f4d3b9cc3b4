"""Rules for numbers of other kinds: complex numbers as pairs, bins, random and unset numbers."""

from __future__ import annotations

from typing import Any

from fedrebasin import axes
from fedrebasin.axes import leaf
from fedrebasin.rules.pointwise import pointwise
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule

rule("polar", "complex", "real", "imag", "angle", "conj", "_conj", "conj_physical", "resolve_conj", "resolve_neg")(
    pointwise
)


@rule("view_as_complex")
def view_as_complex(traced: Traced, x: Value) -> Value:
    """The last axis holds real and imaginary parts."""
    del traced
    axes.fix(x.axes[-1], "real and imaginary")
    return Value(x.axes[:-1])


@rule("view_as_real")
def view_as_real(traced: Traced, x: Value) -> Value:
    """A new last axis holds real and imaginary parts."""
    del traced
    return Value([*x.axes, leaf(2, "real and imaginary")])


@rule("bucketize")
def bucketize(traced: Traced, x: Value, bounds: Value, **_: Any) -> Value:
    """The number of the bin of each entry."""
    traced.fix(bounds, "bins")
    return Value(list(x.axes))


@rule("searchsorted")
def searchsorted(traced: Traced, bounds: Value, x: Any, **_: Any) -> Value:
    """As ``bucketize``, with bins for all, or for each index of the axes before the last."""
    if not isinstance(x, Value):
        raise NotCoveredError
    axes.fix(bounds.axes[-1], "bins")
    if len(bounds.axes) > 1:
        pointwise(traced, Value(bounds.axes[:-1]), Value(x.axes[:-1]))
    return Value(list(x.axes))


@rule("empty", "empty_like", "new_empty")
def unset(traced: Traced, *_: Any, **__: Any) -> Value:
    """Only the shape is taken; what is read from it was written before."""
    return Value([leaf(size) for size in traced.output_shapes[0]])


@rule("rand_like", "randn_like", "randint_like")
def random(traced: Traced, *_: Any, **__: Any) -> Value:
    """Only the shape is taken; every entry is a number of its own."""
    return Value([leaf(size, "random numbers") for size in traced.output_shapes[0]])


@rule("bernoulli", "exponential", "normal", "random", "uniform")
def random_with(traced: Traced, x: Value, *_: Any, **__: Any) -> Value:
    """Every entry is a number of its own, drawn with a parameter or into a tensor."""
    traced.fix(x, "random numbers")
    return Value(list(x.axes))
