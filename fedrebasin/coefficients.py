"""Averaging weights, and the types that sums are taken in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError


def check_coefficients(coefficients: Sequence[float] | None, count: int) -> list[float]:
    """Coefficients that sum to 1, equal ones by default.

    >>> check_coefficients([1, 3], 2)
    [0.25, 0.75]
    """
    if count == 0:
        raise RebasinError("models: expected at least one state dict; got none")
    if coefficients is None:
        return [1 / count] * count
    values = [float(value) for value in coefficients]
    if len(values) != count:
        raise RebasinError(f"coefficients: expected {count}, one for each model; got {len(values)}")
    if not all(value >= 0 for value in values) or not 0 < sum(values) < math.inf:
        raise RebasinError(f"coefficients: expected finite numbers, none negative and not all zero; got {values}")
    return [value / sum(values) for value in values]


def wide_type(tensor: Tensor) -> torch.dtype | None:
    """The type that averages of such tensors are summed in; None for integers and booleans, which are not averaged.

    >>> wide_type(torch.tensor(1j)), wide_type(torch.tensor(1))
    (torch.complex128, None)
    """
    if tensor.is_complex():
        return torch.complex128
    return torch.float64 if tensor.is_floating_point() else None


def single(x: Tensor) -> Tensor:
    """Half-precision numbers in float32, others as they are: sums of products do not fit into half precision.

    >>> single(torch.ones(1).half()).dtype, single(torch.ones(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
