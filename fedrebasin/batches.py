"""How a model is called with a batch, and how collections of batches are read."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedrebasin.errors import CalibrationError


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch: a tensor, a tuple or list of inputs, or a dict of keywords.

    >>> split_inputs({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


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


class Batches:
    """A re-iterable collection of batches, moved to a device one by one.

    A batch is what the model is called with: a tensor, a tuple or list of inputs, or a dict of keywords; or one
    item longer, its last the target (a labelled DataLoader).

    Parameters
    ----------
    batches : iterable
        Read once for each pass; a generator, which would be empty the second time, is refused.
    inputs : int
        How many positional inputs the model takes; what follows them is the target.
    name : str
        The parameter's name, for messages.

    Raises
    ------
    CalibrationError
        If ``batches`` can be read only once, or yields nothing.

    Examples
    --------
    >>> import torch
    >>> [(args[0].shape, target) for args, _, target in Batches([torch.zeros(2, 4)])]
    [(torch.Size([2, 4]), None)]
    """

    def __init__(
        self, batches: Iterable[Any], *, inputs: int = 1, name: str = "calibration", device: Any = None
    ) -> None:
        if isinstance(batches, Iterator):
            raise CalibrationError(
                f"{name}: expected a collection that can be read more than once; got a {type(batches).__name__}; "
                f"pass list(...) of it, or a DataLoader"
            )
        if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
            raise CalibrationError(
                f"{name}: expected a list or DataLoader of batches; got a {type(batches).__name__}; pass [batch]"
            )
        self._batches, self._inputs, self._name, self.device = batches, inputs, name, device

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """Yield positional inputs, keywords and the target (``None`` without one)."""
        empty = True
        for batch in self._batches:
            empty = False
            args, kwargs = split_inputs(_to(batch, self.device))
            if isinstance(batch, tuple | list) and len(args) == self._inputs + 1:
                yield args[:-1], kwargs, args[-1]
            elif not kwargs and len(args) == 2 and self._inputs == 0 and isinstance(args[0], Mapping):
                yield (), dict(args[0]), args[1]
            elif kwargs or len(args) == self._inputs:
                yield args, kwargs, None
            else:
                raise CalibrationError(
                    f"{self._name}: expected batches of {self._inputs} inputs, with or without a target; "
                    f"got {len(args)} items"
                )
        if empty:
            raise CalibrationError(f"{self._name}: expected at least one batch; got none")


def _to(value: Any, device: Any) -> Any:
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_to(item, device) for item in value)
    return value


def count_inputs(model: nn.Module) -> int:
    """How many positional inputs ``model.forward`` takes without a default; at least one.

    >>> count_inputs(nn.Linear(2, 2))
    1
    """
    signature = inspect.signature(model.forward)
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    needed = [p for p in signature.parameters.values() if p.kind in positional and p.default is inspect.Parameter.empty]
    return max(1, len(needed))


def count_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> int:
    """How many examples a batch holds: the length of its target, or of the first input where that is no tensor.

    >>> import torch
    >>> count_examples((torch.zeros(3, 2),), {}, {"boxes": None})
    3
    """
    for value in (target, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    return 1


@torch.no_grad()
def mean_loss(batches: Batches, loss: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor]) -> float:
    """The mean of ``loss(args, kwargs, target)``, each batch's own mean, over all examples of labelled batches."""
    total, count = 0.0, 0
    for args, kwargs, target in batches:
        if target is None:
            raise CalibrationError("batches: expected (input, target) pairs; got a batch without a target")
        size = count_examples(args, kwargs, target)
        total += float(loss(args, kwargs, target)) * size
        count += size
    return total / count


def tensors(output: Any) -> list[Tensor]:
    """All floating tensors in a model's output, in order: a tensor, or a tuple, dict or dataclass of outputs.

    A complex one comes as pairs of numbers, with one axis more.

    >>> len(tensors({"logits": torch.zeros(2), "hidden": (torch.zeros(3), None)}))
    2
    """
    if isinstance(output, Tensor):
        output = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in tensors(value)]
    if dataclasses.is_dataclass(output):
        return [tensor for part in dataclasses.fields(output) for tensor in tensors(getattr(output, part.name))]
    return []


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
