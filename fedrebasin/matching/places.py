"""Where in a forward pass the units of a permutation can be seen: what layers with weights read and write.

A :class:`Watch` listens to the functions that layers call (``torch.nn.functional.linear`` and its kin), not to
classes of modules. The function says which axis of its weight is an axis of the activation, and the spec says what
lies along it. So layers written by hand, shared layers and the projections inside ``nn.MultiheadAttention`` are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrebasin.corrections.calls import AFFINE, CONVOLUTIONS, NORMS, TRANSPOSED, names_of_tensors
from fedrebasin.layout import Layout, Product, Sum
from fedrebasin.spec import PermutationSpec

#: Called with the place's name, what lies along the units' axis, and the activation with that axis first.
See = Callable[[str, Layout, Tensor], None]

_ATTENTION = F.multi_head_attention_forward
#: function -> names of its first arguments, which a call may give by position or by name
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    **{function: names for function, names in AFFINE.items() if function not in NORMS},
    F.embedding: ("input", "weight"),
    _ATTENTION: (
        *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k"),
        *("bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias"),
    ),
}


@dataclass(frozen=True)
class _Layer:
    """A call of a layer: the units' axis of its input and output, and what lies along it."""

    name: str
    dim: int
    reads: Layout | None
    writes: Layout | None


class Watch(TorchFunctionMode):
    """Inside its ``with``, ``see`` is called with whatever the layers of ``net`` read and write, in order."""

    def __init__(self, net: nn.Module, spec: PermutationSpec, see: See) -> None:
        super().__init__()
        self._names = names_of_tensors(net)
        self._spec, self._see = spec, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; if it is a layer's, show its input and output."""
        kwargs = kwargs or {}
        names = _ARGUMENTS.get(func)
        given = {} if names is None else {**dict(zip(names, args, strict=False)), **kwargs}
        if func is _ATTENTION:
            for projection, read, written in self._projections(given):
                self._show(projection, "reads", read)
                self._show(projection, "writes", written)
            given |= {"weight": given.get("out_proj_weight"), "bias": given.get("out_proj_bias")}
        layer = None if names is None else self._layer(func, given)
        if layer is not None:
            self._show(layer, "reads", given.get("input"))
        result = func(*args, **kwargs)
        if layer is not None:
            self._show(layer, "writes", result[0] if func is _ATTENTION else result)
        return result

    def _show(self, layer: _Layer, how: str, seen: Any) -> None:
        layout = layer.reads if how == "reads" else layer.writes
        if layout is None or not isinstance(seen, Tensor) or not seen.is_floating_point():
            return
        if seen.ndim >= -layer.dim and seen.shape[layer.dim] == layout.size:
            self._see(f"{layer.name} {how}", layout, seen.movedim(layer.dim, 0))

    def _axis(self, tensor: Any, dim: int) -> Layout | None:
        """What lies along an axis of a tensor of the state dict."""
        name = self._names.get(id(tensor))
        layouts = () if name is None else self._spec.axes[name]
        return layouts[dim] if dim < len(layouts) else None

    def _layer(self, func: Any, given: Mapping[str, Any]) -> _Layer | None:
        weight, bias, groups = given.get("weight"), given.get("bias"), given.get("groups", 1)
        name = self._names.get(id(weight), self._names.get(id(bias)))
        if name is None or not isinstance(weight, Tensor):
            return None
        first, second, written = self._axis(weight, 0), self._axis(weight, 1), self._axis(bias, 0)
        if func in CONVOLUTIONS:
            return _Layer(name, 1 - weight.ndim, _grouped(first, second, groups), first or written)
        if func in TRANSPOSED:
            return _Layer(name, 1 - weight.ndim, first, written or _grouped(first, second, groups))
        if func is F.linear or func is _ATTENTION:
            return _Layer(name, -1, second, first or written)
        if weight.ndim != 2:
            return None
        return _Layer(name, -1, first, second or written)  # weights (input, output): products and lookups

    def _projections(self, given: Mapping[str, Any]) -> Iterator[tuple[_Layer, Tensor, Tensor]]:
        """Query, key and value of an attention: layer, input and output of each."""
        whole, bias = given.get("in_proj_weight"), given.get("in_proj_bias")
        weights = [given.get(f"{kind}_proj_weight") for kind in "qkv"] if whole is None else whole.chunk(3)
        written = self._axis(whole, 0)
        parts = written.parts if isinstance(written, Sum) and len(written.parts) == 3 else (None, None, None)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        for place, kind in enumerate(("query", "key", "value")):
            weight = weights[place]
            name = self._names.get(id(weight if whole is None else whole))
            if name is not None and weight is not None:
                writes = self._axis(weight, 0) if whole is None else parts[place]
                layer = _Layer(f"{name} {kind}", -1, self._axis(weight if whole is None else whole, 1), writes)
                yield layer, given[kind], F.linear(given[kind], weight, biases[place])


def _grouped(outer: Layout | None, inner: Layout | None, groups: int) -> Layout | None:
    """Channels of a grouped convolution on the side where the weight has those of one group: groups, then channels."""
    if groups == 1 or outer is None or inner is None:
        return inner
    factors = outer.factors if isinstance(outer, Product) else (outer,)
    for count in range(1, len(factors) + 1):
        if math.prod(factor.size for factor in factors[:count]) == groups:
            return Product((*factors[:count], inner))
    return None
