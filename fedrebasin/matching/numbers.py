"""The type that products of a matching are taken in, and the sums that are taken in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError

#: Sums of products above this leave float32; norms above that leave float64.
_LARGE, _LARGEST = 1e37, 1e150
#: Entries of a tensor that are multiplied at once. A product of so many keeps a core busy, and three copies of it lie
#: in its cache or near it.
PIECE = 1 << 20


def like_of(tensors: Sequence[Tensor], scale: float, device: torch.device | str | None) -> Tensor:
    """An empty tensor of the type and on the device that products are taken in."""
    wide = scale > _LARGE or any(tensor.dtype == torch.float64 for tensor in tensors)
    device = device or next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)
    return torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=device)


def norm_of(tensor: Tensor, name: str, label: str) -> float:
    """The norm of a tensor of the model ``label``, which has to be finite.

    >>> norm_of(torch.tensor([3.0, 4.0]), "w", "model")
    5.0
    """
    narrow = tensor.dtype.itemsize == 1
    tensor = tensor.detach() if tensor.is_floating_point() and not narrow else tensor.double()
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if not norm < _LARGEST:  # a NaN is not
        raise SpecMismatchError(
            f"{label}: {name!r} holds a NaN, an infinity or numbers whose squares overflow; leave this model out"
        )
    return norm


def dot(first: Tensor, second: Tensor) -> float:
    """The sum of products of entries, in float64.

    >>> dot(torch.ones(2), torch.tensor([3.0, 4.0]))
    7.0
    """
    if first.numel() <= PIECE:
        return float((first * second).sum(dtype=torch.float64))
    rows = max(1, PIECE // first[0].numel())  # no copy of a large tensor is made
    places = [slice(start, start + rows) for start in range(0, len(first), rows)]
    return math.fsum(float((first[place] * second[place]).sum(dtype=torch.float64)) for place in places)
