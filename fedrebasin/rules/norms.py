"""Rules for normalization: statistics over some axes, scale and shift along others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin.rules.pointwise import pointwise
from fedrebasin.rules.reductions import dims_of, reduced
from fedrebasin.rules.registry import Traced, Value, rule


@rule("batch_norm", "instance_norm")
def batch_norm(
    traced: Traced,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    running_mean: Value | None = None,
    running_var: Value | None = None,
    *_: Any,
) -> Value:
    """Per channel, axis 1; running statistics move with their channels."""
    for value in (weight, bias, running_mean, running_var):
        if value is not None:
            traced.tie(x.axes[1], value.axes[0])
    traced.statistics |= {value.name for value in (running_mean, running_var) if value is not None}
    traced.within([x.axes[1]])
    return Value(list(x.axes))


@rule("layer_norm", "rms_norm")
def layer_norm(
    traced: Traced, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Any = None, *_: Any
) -> Value:
    """Over the last axes; their permutation is free as long as weight and bias follow."""
    last = x.axes[len(x.axes) - len(shape) :]
    for value in (weight, bias):
        if isinstance(value, Value):
            for axis, other in zip(last, value.axes, strict=True):
                traced.tie(axis, other)
    traced.within(x.axes[: len(x.axes) - len(shape)])
    return Value(list(x.axes))


@rule("group_norm")
def group_norm(
    traced: Traced, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Per group of channels, axis 1."""
    split = traced.split(x.axes[1], [groups, x.axes[1].size // groups])
    for value in (weight, bias):
        if value is not None:
            traced.tie(x.axes[1], value.axes[0])
    traced.within([x.axes[0], split[0]])
    return Value(list(x.axes))


@rule("prelu", "_prelu_kernel")
def prelu(traced: Traced, x: Value, weight: Value) -> Value:
    """One slope, or one for each channel, axis 1."""
    if len(weight.axes) > 1:
        return pointwise(traced, x, weight)
    if weight.axes and weight.axes[0].size != 1:
        traced.tie(x.axes[1 if len(x.axes) > 1 else 0], weight.axes[0])
    return Value(list(x.axes))


@rule("_weight_norm")
def weight_norm(traced: Traced, v: Value, g: Value, dim: int = 0) -> Value:
    """``g`` times ``v`` over its norm along all axes but ``dim``."""
    traced.within([v.axes[dim]] if len(g.axes) == len(v.axes) else [])
    return pointwise(traced, v, g)


@rule("_weight_norm_interface")
def weight_norm_and_norms(traced: Traced, v: Value, g: Value, dim: int = 0) -> tuple[Value, Value]:
    """As ``_weight_norm``, with the norms."""
    return weight_norm(traced, v, g, dim), Value(list(g.axes))


@rule("cosine_similarity")
def cosine_similarity(traced: Traced, a: Value, b: Value, dim: int = 1, *_: Any) -> Value:
    """A sum over ``dim`` of products and of squares."""
    both = pointwise(traced, a, b)
    traced.within(both.axes)
    return Value(reduced(traced, both, dims_of(both, dim)))


@rule("pairwise_distance")
def pairwise_distance(traced: Traced, a: Value, b: Value, *_: Any) -> Value:
    """A norm of the differences along the last axis."""
    both = pointwise(traced, a, b)
    traced.within(both.axes)
    return Value(reduced(traced, both, dims_of(both, -1)))
