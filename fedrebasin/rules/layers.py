"""Rules for linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule
from fedrebasin.rules.windows import SPATIAL, apart, positions


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
    del dilation
    return _convolve(traced, x, weight, bias, groups, 0, apart(weight.shape[2:], stride, padding))


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
    del dilation
    kept = apart(weight.shape[2:], stride, padding, output_padding)
    if groups == 1:
        return _convolve(traced, x, weight, bias, groups, 1, kept)
    into, inner = weight.axes[:2]
    traced.tie(into, x.axes[len(x.axes) - len(weight.axes) + 1])
    parts = traced.split(into, [groups, into.size // groups])
    axes.depend(inner, parts[:1])
    return _with_output(traced, x, weight, bias, axes.product([parts[0], inner]), kept)


@rule("torchvision.deform_conv2d")
def deformable_convolution(
    traced: Traced, x: Value, weight: Value, offset: Value, mask: Value, bias: Value, *geometry: Any
) -> Value:
    """As ``convolution``, read at positions that ``offset`` and ``mask`` say, for all channels the same."""
    groups, offset_groups, _ = geometry[-3:]
    if offset_groups != 1:
        raise NotCoveredError
    for axis in (*offset.axes[1:], *mask.axes[1:]):
        axes.fix(axis, SPATIAL)
    return _convolve(traced, x, weight, bias, groups, 0, [False, False])


def _convolve(
    traced: Traced, x: Value, weight: Value, bias: Value | None, groups: int, out_dim: int, kept: Sequence[bool]
) -> Value:
    channel = len(x.axes) - len(kept) - 1
    out, into = weight.axes[out_dim], weight.axes[1 - out_dim]
    if groups == 1:
        traced.tie(into, x.axes[channel])
        alone = [axis for axis, stays in zip(x.axes[channel + 1 :], kept, strict=True) if stays]
        traced.within([*x.axes[: channel + 1], out, *alone])
    else:
        from_groups = traced.split(x.axes[channel], [groups, into.size])
        to_groups = traced.split(out, [groups, out.size // groups])
        traced.tie(from_groups[0], to_groups[0])
        traced.tie(from_groups[1], into)
    return _with_output(traced, x, weight, bias, out, kept)


def _with_output(traced: Traced, x: Value, weight: Value, bias: Value | None, out: Node, kept: Sequence[bool]) -> Value:
    """The output with the channels ``out``; kernels stay, and positions but where they are ``kept`` apart."""
    channel = len(x.axes) - len(kept) - 1
    if bias is not None:
        traced.tie(out, bias.axes[0])
    for axis in weight.axes[2:]:
        axes.fix(axis, SPATIAL)
    found = positions(x.axes[channel + 1 :], traced.output_shapes[0][channel + 1 :], kept)
    return Value([*x.axes[:channel], out, *found])
