"""A user's module from outside: its mode, what is inside a wrapper, and copies of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put ``model`` into training or evaluation mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Have models of transformers return no cache, whose type export does not know: of keys and values, or states."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    using = [config for config in configs if getattr(config, "use_cache", False) is True]
    try:
        for config in using:
            config.use_cache = False
        yield
    finally:
        for config in using:
            config.use_cache = True


class _Inside(nn.Module):
    """The model inside a wrapper, under the same names."""

    def __init__(self, wrapper: nn.Module, name: str) -> None:
        super().__init__()
        self.inner_name = name
        self.add_module(name, getattr(wrapper, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.inner_name)(*args, **kwargs)


def unwrapped(model: nn.Module) -> nn.Module:
    """A model that computes what ``torch.compile`` or a data-parallel wrapper around it computes, without the wrapper.

    >>> wrapped = nn.DataParallel(nn.Linear(2, 2))
    >>> list(unwrapped(wrapped).state_dict()) == list(wrapped.state_dict())
    True
    """
    if hasattr(model, "_orig_mod"):
        return _Inside(model, "_orig_mod")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _Inside(model, "module")
    return model


def deep_copy(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A deep copy, also where a module holds computed tensors (buffers, attributes), which ``copy.deepcopy`` refuses.

    With ``device`` all that modules hold is there, attributes included, which ``Module.to`` leaves behind.

    >>> net = nn.Linear(2, 2)
    >>> net.squares = [net.weight**2]
    >>> deep_copy(net).squares[0].requires_grad
    False
    """
    memo: dict[int, Any] = {}
    for tensor in held_tensors(model):
        where = tensor.device if device is None else torch.device(device)
        if where != tensor.device or not tensor.is_leaf:
            copied = tensor.detach().to(where, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return copy.deepcopy(model, memo)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what modules hold as attributes or in lists and dicts; some may come twice.

    >>> [tuple(tensor.shape) for tensor in held_tensors(nn.Linear(3, 2))]
    [(2, 3), (2,)]
    """
    return [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
