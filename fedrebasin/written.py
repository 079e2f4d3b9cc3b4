"""Which buffers a forward pass in training mode writes: running averages, codebooks, banks of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedrebasin.batches import tensors
from fedrebasin.memory import storage_of
from fedrebasin.modules import deep_copy


def written_buffers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """The floating ones that are no single numbers, seen on a copy: without memory, if the model runs there.

    Running statistics of norms may be missing: their ops say who they are.

    >>> net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    >>> sorted(written_buffers(net, (torch.zeros(2, 3),), {}))
    ['parametrizations.weight.0._u', 'parametrizations.weight.0._v']
    """
    if not any(map(_counts, model.buffers())):
        return frozenset()
    for device in ("meta", "cpu"):
        try:
            return _written(deep_copy(model, device).to(device), args, kwargs)
        except Exception:  # noqa: BLE001 - branches on values, norms that want larger batches: any error of a model's
            continue
    return frozenset()


def _counts(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.ndim > 0


def _written(shadow: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """Buffers that a forward pass writes, or puts others in the place of."""
    before = {
        name: (buffer, buffer._version, buffer.untyped_storage())
        for name, buffer in shadow.named_buffers()
        if _counts(buffer)
    }
    device = next(buffer.device for buffer, _, _ in before.values())
    inputs, keywords = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Writes() as writes:
        shadow.train()(*inputs, **keywords)
    after = dict(shadow.named_buffers())
    return frozenset(
        name
        for name, (buffer, version, storage) in before.items()
        if after[name] is not buffer
        or buffer._version != version
        or storage._cdata in writes.storages
        or storage_of(buffer) != storage._cdata  # by buffer.data = ...
    )


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for modes
    """Sees which storages are written, also by way of ``tensor.data``, which counts no version."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(getattr(getattr(func, "_schema", None), "arguments", ()), args, strict=False):
            if argument.is_write:
                self.storages.update(map(storage_of, tensors(value)))
        return func(*args, **(kwargs or {}))
