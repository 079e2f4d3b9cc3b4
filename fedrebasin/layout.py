"""The layout of one axis of a tensor: which of its units which permutation moves. Immutable.

::

    Free("fc1", 512)                          512 units moved by the permutation "fc1"
    Fixed(10, "output")                       10 units that stay
    Sum((Free("stem", 64), Free("x", 32)))    concat: 64 units, then 32
    Product((Free("conv5", 512), Fixed(49)))  flatten: unit c, pixel p is index 49 * c + p
    Free("inner", 4, over="groups")           a family: its own permutation for each index of "groups"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError


@dataclass(frozen=True)
class Free:
    """``size`` units in the order of the permutation ``perm``; with ``over``, one permutation for each index of it."""

    perm: str
    size: int
    over: str = ""


@dataclass(frozen=True)
class Fixed:
    """``size`` units that stay where they are, and why; ``name`` is there only if a family is over them."""

    size: int
    reason: str = ""
    name: str = ""


@dataclass(frozen=True)
class Sum:
    """Parts side by side."""

    parts: tuple[Layout, ...]

    @cached_property
    def size(self) -> int:
        """Number of units."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Product:
    """Factors, the outermost first."""

    factors: tuple[Layout, ...]

    @cached_property
    def size(self) -> int:
        """Number of units."""
        size = 1
        for factor in self.factors:
            size *= factor.size
        return size


Layout = Free | Fixed | Sum | Product


def leaves(layout: Layout) -> Iterator[Free | Fixed]:
    """All leaves of a layout, in order.

    >>> [leaf.size for leaf in leaves(Product((Free("c", 8), Fixed(49))))]
    [8, 49]
    """
    match layout:
        case Sum(parts=children) | Product(factors=children):
            for child in children:
                yield from leaves(child)
        case _:
            yield layout


def positions(layout: Layout, name: str) -> Tensor | None:
    """Where the units of one leaf lie along the axis.

    Parameters
    ----------
    layout : Layout
    name : str
        A permutation, or the name of a fixed leaf that a family is over.

    Returns
    -------
    Tensor, shape (size, copies), int64, or None
        Row ``i`` lists the indices of unit ``i``; ``None`` if the leaf does not occur.

    Examples
    --------
    >>> positions(Product((Free("c", 2), Fixed(3))), "c")
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    match layout:
        case Free(perm=own) | Fixed(name=own):
            return torch.arange(layout.size).unsqueeze(1) if own == name else None
        case Sum():
            found, offset = [], 0
            for part in layout.parts:
                inside = positions(part, name)
                if inside is not None:
                    found.append(inside + offset)
                offset += part.size
            return torch.cat(found, dim=1) if found else None
        case Product():
            grid = torch.arange(layout.size).view([factor.size for factor in layout.factors])
            for dim, factor in enumerate(layout.factors):
                inside = positions(factor, name)
                if inside is not None:  # a leaf occurs in one factor only: two would make the axis quadratic
                    return grid.movedim(dim, 0)[inside].flatten(1)
            return None


def to_json(layout: Layout) -> dict[str, Any]:
    """A layout as plain JSON types; the inverse of :func:`from_json`.

    >>> to_json(Free("fc1", 512))
    {'perm': 'fc1', 'size': 512}
    """
    match layout:
        case Free():
            return {"perm": layout.perm, "size": layout.size} | ({"over": layout.over} if layout.over else {})
        case Fixed():
            return {"fixed": layout.reason, "size": layout.size} | ({"name": layout.name} if layout.name else {})
        case Sum():
            return {"sum": [to_json(part) for part in layout.parts]}
        case Product():
            return {"product": [to_json(factor) for factor in layout.factors]}


def from_json(data: Any) -> Layout:
    """A layout from plain JSON types.

    Raises
    ------
    RebasinError
        If ``data`` is not a layout.

    Examples
    --------
    >>> from_json({"sum": [{"perm": "a", "size": 2}, {"fixed": "input", "size": 3}]}).size
    5
    """
    match data:
        case {"perm": str(perm), "size": int(size)} if size > 0:
            return Free(perm, size, str(data.get("over", "")))
        case {"fixed": str(reason), "size": int(size)} if size >= 0:
            return Fixed(size, reason, str(data.get("name", "")))
        case {"sum": [*parts]}:
            return Sum(tuple(from_json(part) for part in parts))
        case {"product": [*factors]}:
            return Product(tuple(from_json(factor) for factor in factors))
    raise RebasinError(f"spec: expected a layout with perm, fixed, sum or product; got {str(data)[:80]}")


def describe(layout: Layout) -> str:
    """A layout in one short line.

    >>> describe(Product((Free("conv5", 512), Fixed(49, "spatial"))))
    'conv5[512] x 49'
    """
    match layout:
        case Free():
            return f"{layout.perm}[{layout.size}]" + (f" in each of {layout.over}" if layout.over else "")
        case Fixed():
            return str(layout.size)
        case Sum():
            return " + ".join(describe(part) for part in layout.parts)
        case Product():
            return " x ".join(
                f"({describe(factor)})" if isinstance(factor, Sum) else describe(factor) for factor in layout.factors
            )
