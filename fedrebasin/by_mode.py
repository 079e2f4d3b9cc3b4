"""Whether a model's own code does something else in training mode than in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fedrebasin.batches import copied, tensors
from fedrebasin.modules import deep_copy, mode_of, without_cache

#: How libraries name layers that drop units, or a block of residuals, and divide by the share that is kept.
_DROPS = ("Dropout", "DropPath", "StochasticDepth")

#: The means of random numbers that depend on no argument.
_MEANS = {"aten::rand": 0.5, "aten::rand_like": 0.5, "aten::randn": 0.0, "aten::randn_like": 0.0}


def differs_in_training(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run a copy in both modes and compare; layers that mix or drop in training as usual stay in evaluation mode.

    Dropout keeps everything, and random numbers are their means: noise is no difference that an output could show.
    False where no code of the model's speaks of ``training``, and where it does not run in training mode: it may want
    other inputs there (detectors want targets).

    >>> class Scores(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x) if self.training else super().forward(x).logsumexp(-1)
    >>> inputs = (torch.randn(3, 4),)
    >>> differs_in_training(Scores(4, 2), inputs, {}), differs_in_training(nn.Dropout(), inputs, {})
    (True, False)
    """
    if not _may_ask(model):
        return False
    try:
        copy = deep_copy(model)
        with torch.no_grad(), without_cache(copy), mode_of(copy, training=False):
            before = _outputs(copy, args, kwargs)
            for module in copy.modules():
                module.training = not _as_usual(module)
            return not _same(before, _outputs(copy, args, kwargs))
    except Exception:  # noqa: BLE001 - any error of a model's
        return False


def _may_ask(model: nn.Module) -> bool:
    """Whether code of a user's speaks of ``training``: two forward passes are worth it there alone."""
    seen: set[int] = set()
    return any(_speaks_of_it(function, seen) for module in model.modules() for function in _functions(module))


def _functions(module: nn.Module) -> Iterator[object]:
    """The functions of a module's class, but torch's, those set on the module itself, and its hooks."""
    for kind in type(module).__mro__:
        if kind is not object and not kind.__module__.startswith("torch.nn."):
            yield from vars(kind).values()
    yield from vars(module).values()
    yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def _speaks_of_it(value: object, seen: set[int]) -> bool:
    for inner in ("__func__", "__wrapped__", "fget"):  # of methods, decorated functions and properties
        if getattr(type(value), inner, None) is not None or inner in getattr(value, "__dict__", {}):
            value = getattr(value, inner)
    if not isinstance(value, FunctionType) or value.__module__.startswith("torch.") or id(value) in seen:
        return False
    seen.add(id(value))
    names = list(_names(value.__code__))
    return "training" in names or any(_speaks_of_it(value.__globals__.get(name), seen) for name in names)


def _names(code: CodeType) -> Iterator[str]:
    """What a function reads by name, attributes and texts, that of functions inside it, too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


def _as_usual(module: nn.Module) -> bool:
    """Whether a layer is torch's, takes a batch's statistics, or has nothing of its own and drops by its name."""
    kind = type(module)
    drops = kind.__name__.endswith(_DROPS) and not [*module.parameters()]
    return drops or kind.__module__.startswith("torch.nn.") or isinstance(module, _NormBase)


def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    args, kwargs = copied((args, kwargs), device)
    with _Means(), torch.random.fork_rng(devices=[]):  # type: ignore[no-untyped-call]  # torch has no types for modes
        torch.manual_seed(0)
        found = model(*args, **kwargs)
    return tensors(found), tree_flatten(found)[1]


def _same(one: tuple[list[Tensor], Any], other: tuple[list[Tensor], Any]) -> bool:
    if one[1] != other[1] or [tensor.shape for tensor in one[0]] != [tensor.shape for tensor in other[0]]:
        return False
    pairs = zip(one[0], other[0], strict=True)
    return all(a.is_meta or torch.allclose(a, b.to(a.dtype), rtol=1e-3, atol=1e-6, equal_nan=True) for a, b in pairs)


class NothingDropped(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no types
    """Makes dropout and stochastic depth keep everything, as they do on average; sees if truth values are taken."""

    supports_higher_order_operators = True
    branched = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.branched = self.branched or args[0].dtype is torch.bool or args[0].is_floating_point()
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        return func(*args, **(kwargs or {}))


class _Means(NothingDropped):  # type: ignore[no-untyped-call]  # as above
    """Makes normal and uniform random numbers their means, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name if hasattr(func, "_schema") else ""  # torch.cond and its like have none
        if name in _MEANS:
            return drawn.fill_(_MEANS[name])
        if name == "aten::normal":
            return drawn.zero_().add_(args[0])
        if name == "aten::normal_":
            return drawn.fill_(args[1] if len(args) > 1 else 0.0)
        if name == "aten::uniform_":
            return drawn.fill_(sum(args[1:3]) / 2 if len(args) > 2 else (1 + sum(args[1:2])) / 2)
        return drawn
