"""Which tensors are one, and which share memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """The same for all views of one memory, also where there is none."""
    number: int = tensor.untyped_storage()._cdata
    return number


def identity(tensor: Tensor) -> object:
    """Equal for two entries of a state dict that are one tensor."""
    if tensor.is_meta or not tensor.numel() or not tensor.data_ptr():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def overlapping(state: Mapping[str, Tensor]) -> set[object]:
    """The identities of tensors that share memory with another one without being the same: a transposed view, say.

    >>> import torch
    >>> weight = torch.ones(2, 2)
    >>> len(overlapping({"a": weight, "tied": weight})), len(overlapping({"a": weight, "b": weight.T}))
    (0, 2)
    """
    memories: dict[int, dict[object, tuple[int, int]]] = {}
    for tensor in state.values():
        if tensor.numel():
            start, item = int(tensor.storage_offset()), tensor.element_size()
            last = start + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            memories.setdefault(storage_of(tensor), {})[identity(tensor)] = start * item, (last + 1) * item
    found: set[object] = set()
    for views in memories.values():
        widest, end = next(iter(views)), 0
        for view, (start, stop) in sorted(views.items(), key=lambda one: one[1]):
            if start < end:
                found |= {view, widest}
            if stop > end:
                widest, end = view, stop
    return found
