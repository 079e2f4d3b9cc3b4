"""Which tensors of a state dict a pass up to a layer reads: the rest need not be sent to a node."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrebasin.corrections.calls import leaves, names_of_tensors

Uses = dict[str, int]


class _Uses(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names, self.found = names, Uses()
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note which tensors of the state dict it is given."""
        self._calls += 1
        for tensor in leaves((args, kwargs or {})):
            name = self._names.get(id(tensor))
            if name is not None:
                self.found.setdefault(name, self._calls)
        return func(*args, **(kwargs or {}))


def first_uses(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Uses:
    """Run the model once and number the tensors of its state dict by the call that reads each first.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).eval()
    >>> uses = first_uses(net, (torch.zeros(1, 2),), {})
    >>> uses["0.weight"] == uses["0.bias"] < uses["1.weight"]
    True
    """
    watch = _Uses(names_of_tensors(model))
    with torch.no_grad(), watch:
        model(*args, **kwargs)
    return watch.found


def read_until(uses: Uses, own: Collection[str], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the tensors that are read no later than those called ``own``; what no call was seen to read is included.

    Examples
    --------
    >>> read_until({"a": 1, "b": 2}, ["a"], {"a": torch.ones(1), "b": torch.ones(1), "hidden": torch.ones(1)})
    ('a', 'hidden')
    """
    last = max((uses[name] for name in own if name in uses), default=None)
    return tuple(name for name in state if last is None or uses.get(name, 0) <= last)
