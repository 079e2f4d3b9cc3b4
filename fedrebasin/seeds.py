"""Random numbers from a seed, without touching torch's global generator."""

from __future__ import annotations

import operator

import torch

from fedrebasin.errors import UsageError


def generator_of(seed: int) -> torch.Generator:
    """A generator on the CPU that ``seed`` alone decides.

    Raises
    ------
    UsageError
        If ``seed`` is no whole number of 64 bits.

    Examples
    --------
    >>> generator_of(3).initial_seed()
    3
    """
    try:
        return torch.Generator().manual_seed(operator.index(seed))
    except (TypeError, ValueError, RuntimeError) as error:  # the last is what older torch raises for too many bits
        raise UsageError(f"seed: expected a whole number of at most 64 bits; got {seed!r}") from error
