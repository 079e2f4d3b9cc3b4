"""Where in a forward pass the units of a permutation can be seen: what layers with weights read and write.

A :class:`Watch` listens to the functions that layers call (``torch.nn.functional.linear`` and its kin), not to
classes of modules. The function says which axis of its weight is an axis of the activation, and the spec says what
lies along it. So layers written by hand, shared layers and the projections inside ``nn.MultiheadAttention`` are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrebasin.layout import Layout, Product, Sum
from fedrebasin.spec import PermutationSpec

#: Called with a name for the place, what lies along the units' axis, and the activation with that axis first.
See = Callable[[str, Layout, Tensor], None]
_Layouts = tuple[Layout, ...]

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
_ATTENTION = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k"),
    *("bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias"),
)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED_CONVOLUTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.addmm)
#: function -> names of its first arguments, which a call may give by position or by name
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: ("input", "weight"),
    **dict.fromkeys(_CONVOLUTIONS, _CONV),
    **dict.fromkeys(_TRANSPOSED_CONVOLUTIONS, _TRANSPOSED),
    **dict.fromkeys(_PRODUCTS, ("input", "weight")),
    torch.addmm: ("bias", "input", "weight"),
    F.multi_head_attention_forward: _ATTENTION,
}


class Watch(TorchFunctionMode):
    """Inside a ``with``, call ``see`` with every activation whose units the spec knows by a layer's weight or bias."""

    def __init__(self, net: nn.Module, spec: PermutationSpec, see: See) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in net.state_dict(keep_vars=True).items()}
        self._spec, self._see = spec, see

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and show what it reads and writes if it is a layer's."""
        kwargs = kwargs or {}
        names = _ARGUMENTS.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if func is F.multi_head_attention_forward:
            self._see_projections(given)
            attended = func(*args, **kwargs)
            self._show("out_proj_weight", -1, given, None, self._axis(given, "out_proj_weight", 0), attended[0])
            return attended
        weight, reads, writes = given.get("weight"), None, None
        if not isinstance(weight, Tensor):
            return func(*args, **kwargs)
        dim = -1
        if func in _CONVOLUTIONS or func in _TRANSPOSED_CONVOLUTIONS:
            dim = 1 - weight.ndim
        groups = given.get("groups", 1)
        first, second, bias = (self._axis(given, *end) for end in (("weight", 0), ("weight", 1), ("bias", 0)))
        if func is F.linear or func in _CONVOLUTIONS:
            reads, writes = _grouped(first, second, groups), first or bias
        elif func in _TRANSPOSED_CONVOLUTIONS:
            reads, writes = first, bias or _grouped(first, second, groups)
        elif func is F.embedding or weight.ndim == 2:
            reads, writes = first, second or bias
        key = "weight" if first is not None else "bias"
        self._show(key, dim, given, reads, None, given["input"])
        written = func(*args, **kwargs)
        self._show(key, dim, given, None, writes, written)
        return written

    def _axis(self, given: Mapping[str, Any], argument: str, dim: int) -> Layout | None:
        name = self._names.get(id(given.get(argument)))
        layouts = () if name is None else self._spec.axes[name]
        return layouts[dim] if dim < len(layouts) else None

    def _show(
        self, key: str, dim: int, given: Mapping[str, Any], reads: Layout | None, writes: Layout | None, seen: Any
    ) -> None:
        layout = reads if writes is None else writes
        if layout is None or not isinstance(seen, Tensor) or not seen.is_floating_point():
            return
        if seen.ndim >= -dim and seen.shape[dim] == layout.size:
            name = self._names[id(given[key])]
            self._see(f"{name} {'writes' if reads is None else 'reads'}", layout, seen.movedim(dim, 0))
