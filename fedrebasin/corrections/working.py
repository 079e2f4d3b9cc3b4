"""A private copy of the user's network that takes one state dict after the other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches, batches_of
from fedrebasin.coefficients import check_coefficients
from fedrebasin.errors import SpecMismatchError
from fedrebasin.modules import deep_copy
from fedrebasin.permute import like_state

#: Fewer observations than this make noisy statistics, and a poor choice of a ridge.
_FEW = 100


def warn_of_few(count: int, what: str, *, name: str = "calibration", stacklevel: int) -> None:
    """Warn where there are fewer examples, or observations, than a correction needs; ``what`` is wrong with them.

    Examples
    --------
    >>> with warnings.catch_warnings(record=True) as found:
    ...     warn_of_few(3, "examples are few for repair", stacklevel=1)
    >>> str(found[0].message)
    'calibration: 3 examples are few for repair; 100 and more would do'
    """
    if count < _FEW:
        warnings.warn(f"{name}: {count} {what}; {_FEW} and more would do", stacklevel=stacklevel)


def working_copy(net: nn.Module, state: Mapping[str, Tensor], device: torch.device | str | None) -> nn.Module:
    """``net`` with the weights of ``state``, in evaluation mode, on ``device`` or where ``state`` is."""
    target = device if device is not None else next(iter(state.values()), torch.zeros(0, device="cpu")).device
    model = deep_copy(net, target).to(target).eval()
    load(model, state)
    return model


def begin(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    coefficients: Sequence[float] | None,
    device: torch.device | str | None,
) -> tuple[nn.Module, Batches, list[float]]:
    """Check what a caller gave: a working copy with the weights of ``merged``, the data, the ends' coefficients.

    ``batches.device`` is where all of them run: ``device``, or where ``merged`` is.
    """
    weights = check_coefficients(coefficients, len(ends))
    model = working_copy(net, merged, device)
    return model, batches_for(net, merged, calibration, device), weights


def batches_for(
    net: nn.Module, state: Mapping[str, Tensor], calibration: Iterable[Any], device: torch.device | str | None
) -> Batches:
    """Calibration batches on ``device`` or where ``state`` is."""
    where = device if device is not None else next(iter(state.values())).device
    return batches_of(net, calibration, device=where)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load ``state`` into the working copy."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise SpecMismatchError(f"net: expected a module of the state dict's architecture; {first}") from error


def extract(model: nn.Module, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The working copy's weights with the keys, order, dtypes and devices of ``like``."""
    own = model.state_dict()
    return like_state(
        like, {name: own[name].detach().to(tensor.device, tensor.dtype, copy=True) for name, tensor in like.items()}
    )
