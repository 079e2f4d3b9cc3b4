"""How a model is called with a batch, and how collections of batches are read."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedrebasin.errors import CalibrationError
from fedrebasin.signatures import positional_of


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


def copied(batch: Any, device: torch.device | str | None = None) -> Any:
    """A batch whose tensors are its own, on ``device`` or where they were: a model may write into what it is given.

    >>> batch = (torch.zeros(2), {"mask": torch.ones(2)})
    >>> copied(batch)[0].add_(1), batch[0]
    (tensor([1., 1.]), tensor([0., 0.]))
    """
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), batch)


@dataclass(frozen=True)
class AsCalled:
    """Batches for a model that is called with so many positional inputs, optional ones among them; 0: with keywords.

    >>> list(AsCalled([1, 2], inputs=1))
    [1, 2]
    """

    batches: Iterable[Any]
    inputs: int

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def as_called(batches: Iterable[Any], example_inputs: Any) -> Iterable[Any]:
    """Batches for a model that is called as with ``example_inputs``; as they are, where there are none."""
    return batches if example_inputs is None else AsCalled(batches, len(split_inputs(example_inputs)[0]))


class Batches:
    """A re-iterable collection of batches, copied to a device one by one: a model may write into its inputs.

    A batch is what the model is called with: a tensor, a tuple or list of inputs, or a dict of keywords; or one
    item longer, its last the target (a labelled DataLoader).

    Parameters
    ----------
    batches : iterable
        Read once for each pass; a generator, which would be empty the second time, is refused.
    inputs : int
        How many positional inputs the model takes; what follows them is the target.
    keywords : bool
        A pair that starts with a dict is one of keywords and target; so it is without positional inputs.
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
        self,
        batches: Iterable[Any],
        *,
        inputs: int = 1,
        keywords: bool = False,
        name: str = "calibration",
        device: Any = None,
    ) -> None:
        batches = batches.batches if isinstance(batches, AsCalled) else batches
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
        self._keywords = keywords or inputs == 0

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """Yield positional inputs, keywords and the target (``None`` without one) of batches that hold examples."""
        empty, got = True, "none"
        for batch in self._batches:
            args, kwargs, target = copied(self._parted(batch), self.device)
            if count_examples(args, kwargs, target):
                empty = False
                yield args, kwargs, target
            got = "none with examples"
        if empty:
            raise CalibrationError(f"{self._name}: expected at least one batch; got {got}")

    def _parted(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        args, kwargs = split_inputs(batch)
        if self._keywords and len(args) == 2 and isinstance(args[0], Mapping):
            return (), dict(args[0]), args[1]
        if isinstance(batch, tuple | list) and len(args) == self._inputs + 1:
            return args[:-1], kwargs, args[-1]
        if kwargs or len(args) == self._inputs:
            return args, kwargs, None
        raise CalibrationError(
            f"{self._name}: expected batches of {self._inputs} inputs, with or without a target; "
            f"got {len(args)} items; optional inputs go by name, in a dict"
        )


def count_inputs(model: nn.Module) -> int:
    """How many positional inputs ``model.forward`` takes without a default; at least one.

    >>> count_inputs(nn.Linear(2, 2))
    1
    """
    needed = [one for one in positional_of(model.forward) if one.default is inspect.Parameter.empty]
    return max(1, len(needed))


def batches_of(model: nn.Module, batches: Iterable[Any], *, name: str = "calibration", device: Any = None) -> Batches:
    """Batches with the inputs that :class:`AsCalled` counts, or else those that the model cannot do without.

    >>> class Masked(nn.Module):
    ...     def forward(self, x, mask=None): ...
    >>> [len(args) for args, _, _ in batches_of(Masked(), [(1, 2)])]
    [1]
    >>> [len(args) for args, _, _ in batches_of(Masked(), AsCalled([(1, 2)], inputs=2))]
    [2]
    """
    inputs = batches.inputs if isinstance(batches, AsCalled) else None
    return Batches(batches, inputs=inputs or count_inputs(model), keywords=inputs == 0, name=name, device=device)


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
