"""Rules for layers with weights, and for pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.rules.registry import NotCoveredError, Rule, Traced, Value, rule


@rule("linear")
def linear(traced: Traced, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``weight`` is (out, in), or (in,)."""
    traced.tie(weight.axes[-1], x.axes[-1])
    out = weight.axes[:-1]
    if bias is not None and out:
        traced.tie(out[0], bias.axes[0])
    return Value([*x.axes[:-1], *out])


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    traced: Traced,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """``weight`` is (out, in / groups, *kernel); groups and the channels within each group may be permuted."""
    del stride, padding, dilation
    return _convolve(traced, x, weight, bias, groups, out_dim=0)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    traced: Traced,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    """``weight`` is (in, out / groups, *kernel)."""
    del stride, padding, output_padding, dilation
    if groups != 1:
        raise NotCoveredError
    return _convolve(traced, x, weight, bias, groups, out_dim=1)


def _convolve(traced: Traced, x: Value, weight: Value, bias: Value | None, groups: int, out_dim: int) -> Value:
    spatial = len(weight.axes) - 2
    channel = len(x.axes) - spatial - 1
    out, into = weight.axes[out_dim], weight.axes[1 - out_dim]
    if groups == 1:
        traced.tie(into, x.axes[channel])
    else:
        from_groups = axes.split(x.axes[channel], [groups, into.size])
        to_groups = axes.split(out, [groups, out.size // groups])
        if from_groups is None or to_groups is None:
            raise NotCoveredError
        traced.tie(from_groups[0], to_groups[0])
        traced.tie(from_groups[1], into)
    if bias is not None:
        traced.tie(out, bias.axes[0])
    for axis in (*weight.axes[2:], *x.axes[channel + 1 :]):
        axes.fix(axis, "kernel or spatial")
    return Value([*x.axes[:channel], out, *_fixed(traced.output_shapes[0][channel + 1 :])])


def _fixed(sizes: Sequence[int]) -> list[Node]:
    return [leaf(size, "kernel or spatial") for size in sizes]


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
    split = axes.split(x.axes[1], [groups, x.axes[1].size // groups])
    if split is None:
        raise NotCoveredError
    for value in (weight, bias):
        if value is not None:
            traced.tie(x.axes[1], value.axes[0])
    traced.within([x.axes[0], split[0]])
    return Value(list(x.axes))


@rule("prelu")
def prelu(traced: Traced, x: Value, weight: Value) -> Value:
    """One slope, or one for each channel, axis 1."""
    if weight.axes[0].size != 1:
        traced.tie(x.axes[1 if len(x.axes) > 1 else 0], weight.axes[0])
    return Value(list(x.axes))


@rule("embedding")
def embedding(traced: Traced, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    """Rows are looked up by number, so only the columns may be permuted."""
    axes.fix(weight.axes[0], "table")
    traced.fix(indices, "table")
    return Value([*indices.axes, weight.axes[1]])


def _pool(spatial: int) -> Rule:
    """Channels stay apart, positions do not."""

    def pool(traced: Traced, x: Value, *_: Any, **__: Any) -> Value:
        kept = len(x.axes) - spatial
        for axis in x.axes[kept:]:
            axes.fix(axis, "kernel or spatial")
        return Value([*x.axes[:kept], *_fixed(traced.output_shapes[0][kept:])])

    return pool


for _spatial in (1, 2, 3):
    rule(*(f"{kind}_pool{_spatial}d" for kind in ("max", "avg", "adaptive_avg")))(_pool(_spatial))
