"""Where in a forward pass the units of a permutation can be seen: what the layers read and write.

A :class:`Watch` listens to the functions that layers call (``torch.nn.functional.linear`` and its kin), not to
module classes. The function says which axis of its weight is the axis of the activation, and the spec says what lies
along it. So shared layers, layers written by hand and the projections inside ``nn.MultiheadAttention`` are seen too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrebasin.layout import Layout, Product
from fedrebasin.spec import PermutationSpec


class Place(NamedTuple):
    """An axis of an activation: ``key`` says which layer reads or writes it, ``layout`` what lies along ``dim``."""

    key: str
    dim: int
    layout: Layout


See = Callable[[Place, Tensor], None]

#: function -> names of its first arguments; calls may give them by position or by name
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    F.embedding: ("input", "weight"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    F.rms_norm: ("input", "normalized_shape", "weight"),
    F.group_norm: ("input", "num_groups", "weight", "bias"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ("input", "weight")),
    torch.addmm: ("bias", "input", "weight"),
}


class Watch(TorchFunctionMode):
    def __init__(self, net: nn.Module, spec: PermutationSpec, see: See) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in net.state_dict(keep_vars=True).items()}
        self._spec, self._see = spec, see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names = _ARGUMENTS.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = dict(zip(names, args)) | kwargs
        weight = self.layouts(given.get("weight"))
        bias = self.layouts(given.get("bias"))
        key = self._names.get(id(given.get("weight")), self._names.get(id(given.get("bias"))))
        if key is None or not isinstance(given["input"], Tensor):
            return func(*args, **kwargs)
        dim, reads, writes = _axes(func, given, weight, bias)
        if reads is not None and given["input"].is_floating_point():
            self._show(f"in {key}", dim, reads, given["input"])
        out = func(*args, **kwargs)
        if writes is not None:
            self._show(f"out {key}", dim, writes, out)
        return out

    def layouts(self, tensor):
        name = self._names.get(id(tensor))
        return None if name is None else self._spec.axes[name]

    def _show(self, key, dim, layout, tensor):
        assert tensor.shape[dim] == layout.size, (key, tensor.shape, dim, layout)
        self._see(Place(key, dim, layout), tensor)


def _axes(func, given, weight, bias):
    by_bias = bias[0] if bias else None
    name = func.__name__
    if func is F.linear:
        return -1, weight and weight[1], (weight[0] if weight else by_bias)
    if "conv_transpose" in name:
        k = given["weight"].ndim - 2
        return -k - 1, weight and weight[0], by_bias or (weight[1] if weight and given.get("groups", 1) == 1 else None)
    if "conv" in name:
        k = given["weight"].ndim - 2
        return (
            -k - 1,
            (weight and _grouped(weight[0], weight[1], given.get("groups", 1))),
            (weight[0] if weight else by_bias),
        )
    if func is F.embedding:
        return -1, None, weight[1]
    if func in (F.layer_norm, F.rms_norm):
        if given["weight"].ndim > 1:
            return -1, None, None
        return -1, weight[0], weight[0]
    if "norm" in name:
        return 1, weight[0], weight[0]
    if given["weight"].ndim == 2:
        return -1, weight and weight[0], weight[1] if weight else by_bias
    return -1, None, None


def _grouped(outer: Layout, inner: Layout, groups: int) -> Layout | None:
    if groups == 1:
        return inner
    factors = outer.factors if isinstance(outer, Product) else (outer,)
    for count in range(1, len(factors) + 1):
        if math.prod(f.size for f in factors[:count]) == groups:
            return Product((*factors[:count], inner))
    return None
