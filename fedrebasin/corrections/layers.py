"""Which linear maps of a network can be solved for: found by the functions that layers call, in the order of a pass.

A :class:`Layer` is one call of ``torch.nn.functional.linear`` or its kin with a weight of the state dict, so that
layers written by hand are found too. What stands between layers is not looked into: for every layer it is noted
which layers' outputs reach its input without passing through another one, and that is all that a second pass needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fedrebasin.corrections.calls import (
    CONVOLUTIONS,
    address_of,
    arguments_of,
    attention_inside,
    leaves,
    names_of_tensors,
)


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
    >>> steps, left = find_steps(net, (torch.zeros(1, 3, 4, 4),), {})
    >>> [(step.key, step.norm) for step in steps], left
    ([('0.weight', '1'), ('3.weight', None)], {})
    """
    watch = _Watch(model, (args, kwargs))
    with torch.no_grad(), watch:
        output = model(*args, **kwargs)
    return watch.steps(output)


@dataclass(frozen=True)
class _Call:
    func: Any
    given: dict[str, Any]
    output: Tensor
    after: frozenset[int]


class _Watch(TorchFunctionMode):
    """Keeps every call of a layer or BatchNorm, and for every storage the calls that have gone into it."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self._model, self._names = model, names_of_tensors(model)
        self._calls: list[_Call] = []
        self._uses: Counter[int] = Counter()
        self._sources: dict[int, frozenset[int]] = {}
        self._alive: list[Any] = []  # so that neither ids nor addresses are given out twice
        norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
        self._norms = {id(module.running_mean) for module in norms}  # of one written by hand nothing is rewritten
        self._tied = Counter(id(tensor) for tensor in model.state_dict(keep_vars=True).values())
        for tensor in (*leaves(inputs), *model.parameters(), *model.buffers()):
            self._sources[address_of(tensor)] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note what went into its result."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_inside(*args, **kwargs)
        read = list(leaves((args, kwargs)))
        everything = frozenset(range(len(self._calls)))  # what an unseen op made may hold anything so far
        empty: frozenset[int] = frozenset()
        sources = empty.union(*(self._sources.get(address_of(x), everything) for x in read))
        result = func(*args, **kwargs)
        written = list(leaves(result))
        if getattr(func, "__name__", "") == "__setitem__":
            written = read[:1]
        if not written:
            return result  # a shape or a number: no use of the tensor's values that a pass could see
        self._uses.update({id(x): 1 for x in read})
        self._alive += [*read, *written]
        given = arguments_of(func, args, kwargs)
        key = None if given is None else given.get("running_mean" if func is F.batch_norm else "weight")
        known = id(key) in self._names and (func is not F.batch_norm or id(key) in self._norms)
        if given is not None and known and isinstance(result, Tensor):
            self._calls.append(_Call(func, given, result, sources))
            sources = frozenset({len(self._calls) - 1})
        for tensor in written:  # by storage: what is written in place, or through a view, has been read as well
            self._sources[address_of(tensor)] = sources
        return result

    def steps(self, output: Any) -> tuple[list[Step], dict[str, str]]:
        """What :func:`find_steps` returns."""
        left: dict[str, str] = {}
        outputs = {id(tensor) for tensor in leaves(output)}
        norm_of = {id(call.given["input"]): place for place, call in enumerate(self._calls) if self._is_norm(call)}
        folded: dict[int, int] = {}  # place of a layer -> place of the BatchNorm that it takes in
        kept: list[int] = []
        for place, call in enumerate(self._calls):
            if self._is_norm(call):
                if place not in folded.values() and self._uses[id(call.given["running_mean"])] == 1:
                    kept.append(place)
                continue
            reason = self._refuse(call)
            if reason:
                left[self._names[id(call.given["weight"])]] = reason
                continue
            kept.append(place)
            norm = norm_of.get(id(call.output))
            alone = self._uses[id(call.output)] == 1 and id(call.output) not in outputs
            if norm is not None and alone and self._uses[id(self._calls[norm].given["running_mean"])] == 1:
                folded[place] = norm
        where = {place: index for index, place in enumerate(kept)}
        steps = [self._step(place, folded.get(place), self._through(place, where)) for place in kept]
        seen = {step.weight for step in steps if isinstance(step, Layer)}
        for name, tensor in self._model.state_dict().items():
            if name not in seen and tensor.is_floating_point() and tensor.ndim > 1:
                left.setdefault(name, "no linear or convolution layer reads it directly")
        return steps, left

    def _is_norm(self, call: _Call) -> bool:
        return call.func is F.batch_norm and not call.given.get("training", False)

    def _refuse(self, call: _Call) -> str:
        """Why a call's weight cannot be solved for, or ``""``."""
        given = call.given
        weight, bias = given["weight"], given.get("bias")
        if self._uses[id(weight)] > 1 or self._tied[id(weight)] > 1:
            return "it is used more than once"
        if bias is not None and (id(bias) not in self._names or self._uses[id(bias)] > 1 or self._tied[id(bias)] > 1):
            return "its bias is used more than once, or is no tensor of the state dict"
        if given.get("groups", 1) != 1:
            return "a grouped convolution"
        convolution = call.func in CONVOLUTIONS
        if (weight.ndim != 2 and not convolution) or given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
            return "a product that is no plain linear map"
        if not isinstance(given["input"], Tensor) or given["input"].ndim < 2:
            return "its input has no axis of examples"
        return "its input has no axis of examples" if convolution and given["input"].ndim < weight.ndim else ""

    def _through(self, place: int, where: Mapping[int, int]) -> frozenset[int]:
        """Steps that reach a call; a call that is no step is looked through, and so is a BatchNorm."""
        found: set[int] = set()
        stack, done = list(self._calls[place].after), set()
        while stack:
            source = stack.pop()
            if source in done:
                continue
            done.add(source)
            if source in where and not self._is_norm(self._calls[source]):
                found.add(where[source])
            else:
                stack += self._calls[source].after
        return frozenset(found)

    def _step(self, place: int, norm: int | None, after: frozenset[int]) -> Step:
        call = self._calls[place]
        if self._is_norm(call):
            return Norm(self._prefix(call), after)
        weight, bias = call.given["weight"], call.given.get("bias")
        key = self._names[id(weight)]
        bias_key = None if bias is None else self._names[id(bias)]
        prefix = None if norm is None else self._prefix(self._calls[norm])
        if call.func not in CONVOLUTIONS:
            return Layer(key, bias_key, prefix, after, transposed=call.func is not F.linear)
        dims = weight.ndim - 2
        stride, dilation = (_tuple(call.given.get(name, 1), dims) for name in ("stride", "dilation"))
        padding = _padding(call.given.get("padding", 0), weight.shape[2:], dilation)
        return Layer(key, bias_key, prefix, after, stride, padding, dilation)

    def _prefix(self, call: _Call) -> str:
        name = self._names[id(call.given["running_mean"])]
        return name.rpartition(".")[0]


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
