"""Rules for linear layers and convolutions."""

from __future__ import annotations

from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule


@rule("linear")
def linear(traced: Traced, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``weight`` is (out, in), or (in,)."""
    traced.tie(weight.axes[-1], x.axes[-1])
    out = weight.axes[:-1]
    if bias is not None and out:
        traced.tie(out[0], bias.axes[0])
    traced.within([*x.axes, *out])
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
    if groups == 1:
        return _convolve(traced, x, weight, bias, groups, out_dim=1)
    into, inner = weight.axes[:2]
    traced.tie(into, x.axes[len(x.axes) - len(weight.axes) + 1])
    parts = traced.split(into, [groups, into.size // groups])
    axes.depend(inner, parts[:1])
    return _with_output(traced, x, weight, bias, axes.product([parts[0], inner]))


@rule("torchvision.deform_conv2d")
def deformable_convolution(
    traced: Traced, x: Value, weight: Value, offset: Value, mask: Value, bias: Value, *geometry: Any
) -> Value:
    """As ``convolution``, read at positions that ``offset`` and ``mask`` say, for all channels the same."""
    groups, offset_groups, _ = geometry[-3:]
    if offset_groups != 1:
        raise NotCoveredError
    for axis in (*offset.axes[1:], *mask.axes[1:]):
        axes.fix(axis, "kernel or spatial")
    return _convolve(traced, x, weight, bias, groups, out_dim=0)


def _convolve(traced: Traced, x: Value, weight: Value, bias: Value | None, groups: int, out_dim: int) -> Value:
    spatial = len(weight.axes) - 2
    channel = len(x.axes) - spatial - 1
    out, into = weight.axes[out_dim], weight.axes[1 - out_dim]
    if groups == 1:
        traced.tie(into, x.axes[channel])
        traced.within([*x.axes[:channel], into, out])
    else:
        from_groups = traced.split(x.axes[channel], [groups, into.size])
        to_groups = traced.split(out, [groups, out.size // groups])
        traced.tie(from_groups[0], to_groups[0])
        traced.tie(from_groups[1], into)
    return _with_output(traced, x, weight, bias, out)


def _with_output(traced: Traced, x: Value, weight: Value, bias: Value | None, out: Node) -> Value:
    """The output with the channels ``out``; kernels and positions stay."""
    channel = len(x.axes) - len(weight.axes) + 1
    if bias is not None:
        traced.tie(out, bias.axes[0])
    for axis in (*weight.axes[2:], *x.axes[channel + 1 :]):
        axes.fix(axis, "kernel or spatial")
    positions = traced.output_shapes[0][channel + 1 :]
    return Value([*x.axes[:channel], out, *(leaf(size, "kernel or spatial") for size in positions)])
