"""The type that products of a matching are taken in, and the sums that are taken in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError, SpecMismatchError

#: Sums of products above or below these leave float32; norms above that leave float64.
_LARGE, _SMALL, _LARGEST = 1e37, 1e-25, 1e150
#: Entries of a tensor that are multiplied at once. A product of so many keeps a core busy, and three copies of it lie
#: in its cache or near it.
PIECE = 1 << 20
#: Entries that are summed at once: in float64 they are copied first, and the copy stays in a core's cache.
_SUMMED = 1 << 18


def like_of(tensors: Sequence[Tensor], scale: float, device: torch.device | str | None) -> Tensor:
    """An empty tensor of the type and on the device that products are taken in."""
    wide = (
        scale > _LARGE
        or 0 < scale < _SMALL
        or any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    )
    device = device or next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)
    return torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=device)


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with one axis more, of length 2, at its end; no copy, and others as they are.

    Two units' product is then the real part of the Hermitian one, which is what their distance depends on.

    >>> as_real(torch.tensor([1 + 2j]))
    tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()


def refuse_complex(parameters: Iterable[str], state: Mapping[str, Tensor], label: str, where: str, remedy: str) -> None:
    """Raise a RebasinError if one of the parameters is complex.

    >>> refuse_complex(["w"], {"w": torch.tensor(1j)}, "model", "here", "leave it out")
    Traceback (most recent call last):
    ...
    fedrebasin.errors.RebasinError: model: expected real weights here; 'w' is complex; leave it out
    """
    for name in parameters:
        if name in state and state[name].is_complex():
            raise RebasinError(f"{label}: expected real weights {where}; {name!r} is complex; {remedy}")


def norm_of(tensor: Tensor, name: str, label: str) -> float:
    """The norm of a tensor of the model ``label``, which has to be finite.

    >>> norm_of(torch.tensor([3.0, 4.0]), "w", "model")
    5.0
    """
    tensor = as_real(tensor)
    tensor = tensor if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor.double()
    norm = math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in _parts(tensor)))
    if not norm < _LARGEST:  # a NaN is not
        raise SpecMismatchError(
            f"{label}: {name!r} holds a NaN, an infinity or numbers whose squares overflow; leave this model out"
        )
    return norm


def dot(first: Tensor, second: Tensor) -> float:
    """The sum, in float64, of products of entries, which are of their own type.

    >>> dot(torch.ones(2), torch.tensor([3.0, 4.0]))
    7.0
    """
    parts = zip(_parts(first), _parts(second), strict=True)
    return math.fsum(float((one * other).sum(dtype=torch.float64)) for one, other in parts)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """A large tensor in pieces along its first axis."""
    if tensor.numel() <= _SUMMED:
        return (tensor,)
    rows = max(1, _SUMMED // tensor[0].numel())
    return [tensor[start : start + rows] for start in range(0, len(tensor), rows)]
