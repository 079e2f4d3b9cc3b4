"""Where a window that slides over positions holds one alone: such an axis is no more than one more batch axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf

SPATIAL = "kernel or spatial"


def apart(kernel: Sequence[int], stride: Any, padding: Any, more: Any = 0) -> list[bool]:
    """For each axis whether every position stays by itself: a window of 1, moved by 1, nothing added at the ends.

    >>> apart([3, 1, 1], 1, [1, 0, 0]), apart([1, 1], [1, 2], "same")
    ([False, True, True], [True, False])
    """
    padding = 0 if isinstance(padding, str) else padding  # "same" adds nothing for a window of 1
    rows = zip(kernel, *(each(value, len(kernel)) for value in (stride, padding, more)), strict=True)
    return [row == (1, 1, 0, 0) for row in rows]


def each(value: Any, count: int) -> list[int]:
    """A number for each axis, where one may stand for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def positions(spatial: Sequence[Node], sizes: Sequence[int], kept: Sequence[bool]) -> list[Node]:
    """The axes of the result, in these sizes: those that are ``kept``, and fixed ones for neighbours."""
    for axis, stays in zip(spatial, kept, strict=True):
        if not stays:
            axes.fix(axis, SPATIAL)
    return [axis if stays else leaf(size, SPATIAL) for axis, size, stays in zip(spatial, sizes, kept, strict=True)]
