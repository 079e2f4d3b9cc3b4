"""Which linear maps of a network can be solved for: found by the functions that layers call, in the order of a pass.

A :class:`Layer` is one call of ``torch.nn.functional.linear`` or its kin with a weight of the state dict, so that
layers written by hand are found too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin.corrections.calls import ARGUMENTS, CONVOLUTIONS
from fedrebasin.corrections.watch import Call, Watch, watch


@dataclass(frozen=True)
class Layer:
    """A linear map that runs once: the keys of its tensors, its BatchNorm if one follows at once, its geometry.

    ``after`` holds the places, in the list of steps, of the layers whose outputs reach its input.
    """

    weight: str
    bias: str | None
    norm: str | None
    after: frozenset[int]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def key(self) -> str:
        """The tensor by which a call is known."""
        return self.weight


@dataclass(frozen=True)
class Norm:
    """A BatchNorm whose input is not the output of one layer alone; ``norm`` is its module's name."""

    norm: str
    after: frozenset[int]

    @property
    def key(self) -> str:
        """The tensor by which a call is known."""
        return f"{self.norm}.running_mean" if self.norm else "running_mean"


Step = Layer | Norm


def find_steps(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Step], dict[str, str]]:
    """Run the model once and list its layers and free-standing BatchNorms in order.

    Returns
    -------
    steps : list of Layer or Norm
    left : dict of str to str
        Weights that are no layer's, with the reason.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()
    >>> import torch
    >>> steps, left = find_steps(net, (torch.zeros(1, 3, 4, 4),), {})
    >>> [(step.key, step.norm) for step in steps], left
    ([('0.weight', '1'), ('3.weight', None)], {})
    """
    seen = watch(model, args, kwargs)
    # of a BatchNorm that is no module nothing is rewritten
    modules = {id(module.running_mean) for module in model.modules() if isinstance(module, _BatchNorm)}
    norms = {
        place: call
        for place, call in enumerate(seen.calls)
        if call.func is F.batch_norm and not call.given.get("training", False) and id(_mean(call)) in modules
    }
    left: dict[str, str] = {}
    outputs = {id(tensor) for tensor in seen.outputs}
    norm_of = {id(call.given["input"]): place for place, call in norms.items()}
    folded: dict[int, int] = {}  # place of a layer -> place of the BatchNorm that it takes in
    kept: list[int] = []
    for place, call in enumerate(seen.calls):
        if place in norms:
            if place not in folded.values() and seen.uses[id(_mean(call))] == 1:
                kept.append(place)
        elif call.func in ARGUMENTS and call.func is not F.batch_norm:
            reason = _refuse(call, seen)
            if reason:
                left[seen.names[id(call.given["weight"])]] = reason
                continue
            kept.append(place)
            norm = norm_of.get(id(call.output))
            alone = seen.uses[id(call.output)] == 1 and id(call.output) not in outputs
            if norm is not None and alone and seen.uses[id(_mean(norms[norm]))] == 1:
                folded[place] = norm
    where = {place: index for index, place in enumerate(kept)}
    layers = {place: index for place, index in where.items() if place not in norms}  # a BatchNorm is looked through
    steps: list[Step] = []
    for place in kept:
        after, call = seen.through(place, layers), seen.calls[place]
        if place in norms:
            steps.append(Norm(_prefix(call, seen), after))
        else:
            norm = folded.get(place)
            steps.append(_layer(call, None if norm is None else _prefix(norms[norm], seen), after, seen))
    known = {step.weight for step in steps if isinstance(step, Layer)} | set(left)
    return steps, left | seen.unread(known)


def _refuse(call: Call, seen: Watch) -> str:
    """Why a call's weight cannot be solved for, or ``""``."""
    given = call.given
    weight, bias = given["weight"], given.get("bias")
    if weight.is_complex():
        return "its numbers are complex"
    if not seen.used_once(weight):
        return "it is used more than once"
    if bias is not None and (id(bias) not in seen.names or not seen.used_once(bias)):
        return "its bias is used more than once, or is no tensor of the state dict"
    if given.get("groups", 1) != 1:
        return "a grouped convolution"
    convolution = call.func in CONVOLUTIONS
    if (weight.ndim != 2 and not convolution) or given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return "a product that is no plain linear map"
    if not isinstance(given["input"], Tensor) or given["input"].ndim < 2:
        return "its input has no axis of examples"
    return "its input has no axis of examples" if convolution and given["input"].ndim < weight.ndim else ""


def _layer(call: Call, norm: str | None, after: frozenset[int], seen: Watch) -> Layer:
    weight, bias = call.given["weight"], call.given.get("bias")
    key = seen.names[id(weight)]
    bias_key = None if bias is None else seen.names[id(bias)]
    if call.func not in CONVOLUTIONS:
        return Layer(key, bias_key, norm, after, transposed=call.func is not F.linear)
    dims = weight.ndim - 2
    stride, dilation = (_tuple(call.given.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = _padding(call.given.get("padding", 0), weight.shape[2:], dilation)
    return Layer(key, bias_key, norm, after, stride, padding, dilation)


def _mean(call: Call) -> Any:
    return call.given.get("running_mean")


def _prefix(call: Call, seen: Watch) -> str:
    return seen.names[id(_mean(call))].rpartition(".")[0]


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(int(item) for item in value)
    return values * dims if len(values) == 1 else values


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each spatial axis."""
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in _tuple(value, len(kernel)))
