"""Where a network's activations can be corrected: calls of layers and norms that take an affine map per channel.

Sites are found by the functions that a pass calls with tensors of the state dict, so that layers written by hand are
found as well; a norm that computes by hand is known by its module.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrebasin.batches import Batches
from fedrebasin.corrections.calls import (
    AFFINE,
    CONVOLUTIONS,
    NORMS,
    TRANSPOSED,
    address_of,
    arguments_of,
    attention_inside,
    key_of,
    leaves,
    names_of_tensors,
)

LOGGER = logging.getLogger("fedrebasin")


@dataclass(frozen=True)
class Site:
    """A call whose output is corrected along ``dim``, which has so many channels.

    Attributes
    ----------
    name : str
        Of the module that holds the tensors; the key of the tensor where that is called otherwise than in torch.
    weight, bias : str or None
        Keys of the tensors into which the map is fused.
    weight_dim : int
        The weight's axis of channels.
    running : tuple of str, or None
        Keys of a BatchNorm's running mean and variance.
    eps : float
        The BatchNorm's.
    by_module : bool
        The call is the module's; otherwise that of a function with the tensor ``key``.
    """

    name: str
    dim: int
    channels: int
    weight: str | None
    bias: str | None
    weight_dim: int = 0
    running: tuple[str, str] | None = None
    eps: float = 0.0
    by_module: bool = False

    @property
    def key(self) -> str:
        """The tensor by which the call is known."""
        return self.running[0] if self.running is not None else str(self.weight)

    @property
    def keys(self) -> tuple[str, ...]:
        """All its tensors."""
        return tuple(key for key in (self.weight, self.bias, *(self.running or ())) if key is not None)


def find_sites(model: nn.Module, batches: Batches) -> list[Site]:
    """Run one batch and list the sites in the order in which they run; the log names what is none, with the reason.

    A site is a norm with weight and bias, a BatchNorm, or a linear or convolution layer with a bias whose output
    is neither the model's nor goes straight into a norm. What runs more than once or is tied is left out.
    """
    args, kwargs, _ = next(iter(batches))
    watch = _Watch(model)
    with torch.no_grad(), watch.hooks(), watch:
        output = model(*args, **kwargs)
    sites, left = watch.sites(output)
    for name, reason in left.items():
        LOGGER.info("correction: %r takes no affine map of its own: %s", name, reason)
    return sites


@dataclass(frozen=True)
class _Call:
    """A layer's or norm's call; ``func`` is that of the module ``module`` if a norm computes by hand."""

    func: Any
    given: dict[str, Any]
    output: Tensor
    content: tuple[int, int]
    module: str | None = None

    @property
    def norm(self) -> bool:
        return self.module is not None or self.func in NORMS


class _Watch(TorchFunctionMode):
    """Keeps every call of a layer or norm with a tensor of the state dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._names = model, names_of_tensors(model)
        self._calls: list[_Call] = []
        self._normed: set[tuple[int, int, int]] = set()  # what a norm has read: content and size
        self._uses: Counter[int] = Counter()
        self._tied = Counter(id(tensor) for tensor in model.state_dict(keep_vars=True).values())
        self._alive: list[Any] = []  # so that neither ids nor addresses are given out twice

    def hooks(self) -> ExitStack:
        """Watch, inside a ``with``, the modules that look like a norm and may compute by hand."""
        stack = ExitStack()
        for name, module in self._model.named_modules():
            own = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
            if set(own) == {"weight", "bias"} and all(tensor.ndim == 1 for tensor in own.values()):
                stack.callback(module.register_forward_hook(self._hook(name)).remove)
        return stack

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            known = any(call.module is None and call.given.get("weight") is module.weight for call in self._calls)
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and not known:
                given = {"input": args[0], "weight": module.weight, "bias": module.bias}
                self._calls.append(_Call(type(module).forward, given, output, _content(output), name))
                self._normed.add((*_content(args[0]), args[0].numel()))

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note it if it is a layer's or a norm's."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_inside(*args, **kwargs)
        read, given = list(leaves((args, kwargs))), arguments_of(func, args, kwargs, AFFINE)
        ours = given is not None and id(key_of(func, given)) in self._names
        if given is not None and ours and func in NORMS:
            self._normed.add((*_content(given["input"]), given["input"].numel()))
        result = func(*args, **kwargs)
        written = list(leaves(result))
        if written:  # otherwise a shape or a number: no use of the tensors' values; nor is a cast that changes nothing
            self._uses.update({id(x): 1 for x in read if all(x is not y for y in written)})
            self._alive += [*read, *written]
        if given is not None and ours and isinstance(result, Tensor):
            self._calls.append(_Call(func, given, result, _content(result)))
        return result

    def sites(self, output: Any) -> tuple[list[Site], dict[str, str]]:
        """The sites in order, and the tensors that are none's, each with the reason."""
        left: dict[str, str] = {}
        ends = {_content(tensor) for tensor in leaves(output)}
        seen, sites = set[int](), list[Site]()
        for call in self._calls:
            key = self._names[id(key_of(call.func, call.given))]
            seen.update(id(x) for x in call.given.values())
            if not call.norm and (call.content in ends or (*call.content, call.output.numel()) in self._normed):
                continue
            reason = self._refuse(call)
            if reason:
                left[key] = reason
            else:
                sites.append(self._site(call, key))
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen and tensor.is_floating_point() and tensor.ndim > 1:
                left[name] = "no linear or convolution layer reads it directly"
        return [site for site in sites if not left.keys() & site.keys], left

    def _refuse(self, call: _Call) -> str:
        """Why a call is no site, or ``""``."""
        given, weight, bias = call.given, call.given.get("weight"), call.given.get("bias")
        own = [x for x in (weight, bias, given.get("running_mean")) if isinstance(x, Tensor)]
        if any(id(tensor) not in self._names for tensor in own):
            return "its bias is no tensor of the state dict"
        runs = self._uses if call.module is None else Counter(id(c.given["weight"]) for c in self._calls if c.module)
        if any(self._tied[id(tensor)] > 1 or runs[id(tensor)] > 1 for tensor in own):
            return "it is used more than once"
        if call.func is F.batch_norm and weight is None:
            return ""  # nothing but its statistics
        if weight is None or bias is None:
            return "it has no bias"
        if call.func in TRANSPOSED and given.get("groups", 1) != 1:
            return "a grouped transposed convolution"
        if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
            return "a product that is no plain linear map"
        single = bias.ndim == 1 and (weight.ndim == 1 or not call.norm)
        return "" if single and self._dim(call) is not None else "it has other numbers than one a channel"

    def _dim(self, call: _Call) -> int | None:
        """Along which axis of the output channels lie."""
        output, weight = call.output, call.given.get("weight")
        if call.module is not None and weight is not None:
            return next((dim for dim in (1, output.ndim - 1) if output.shape[dim : dim + 1] == weight.shape), None)
        if call.func in (*CONVOLUTIONS, *TRANSPOSED) and weight is not None:
            return output.ndim - int(weight.ndim) + 1
        return 1 if call.func in (F.batch_norm, F.instance_norm, F.group_norm) else output.ndim - 1

    def _site(self, call: _Call, key: str) -> Site:
        dim = self._dim(call)
        assert dim is not None
        mean, variance, weight, bias = (
            None if call.given.get(name) is None else self._names[id(call.given[name])]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        running = None if call.func is not F.batch_norm or mean is None or variance is None else (mean, variance)
        prefix, _, leaf = key.rpartition(".")
        transposed = call.func in TRANSPOSED or (not call.norm and call.func not in (F.linear, *CONVOLUTIONS))
        return Site(
            name=prefix if leaf in ("weight", "running_mean") else key,
            dim=dim,
            channels=call.output.shape[dim],
            weight=weight,
            bias=bias,
            weight_dim=int(transposed),
            running=running,
            eps=call.given.get("eps", 1e-5) if running else 0.0,
            by_module=call.module is not None,
        )


def _content(tensor: Tensor) -> tuple[int, int]:
    """A tensor's storage, and how often it had been written to: the same for all views of it until the next time."""
    return address_of(tensor), 0 if tensor.is_inference() else tensor._version
