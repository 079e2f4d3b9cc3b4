"""Where in a tensor the units of one permutation lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedrebasin.layout import Layout, has_leaf, units
from fedrebasin.permute import outer_dims_of


@dataclass(frozen=True)
class Slab:
    """Where a permutation's units lie in one tensor: along ``dim`` at ``places``, within a part of the other axes.

    ``places`` has shape ``(units, copies)``; ``within`` lists other axes, each with the indices that belong.
    """

    dim: int
    places: Tensor
    within: tuple[tuple[int, Tensor], ...] = ()


def slabs(layouts: Sequence[Layout], perm: str, row: int | None = None) -> list[Slab]:
    """All places of a tensor where the permutation ``perm``, or row ``row`` of a family, moves units."""
    found: list[Slab] = []
    for dim, layout in enumerate(layouts):
        if has_leaf(layout, perm):
            found += _slabs_along(layouts, dim, outer_dims_of(layouts, dim), perm, row, {}, ())
    return found


def _slabs_along(
    layouts: Sequence[Layout],
    dim: int,
    outer_dims: list[tuple[str, int]],
    perm: str,
    row: int | None,
    at: dict[str, int],
    within: tuple[tuple[int, Tensor], ...],
) -> list[Slab]:
    if not outer_dims:
        unit = units(layouts[dim], perm, row=row, at=at)
        where = (unit >= 0).nonzero().squeeze(1)
        if not len(where):
            return []
        order = where[unit[where].argsort(stable=True)]
        return [Slab(dim, order.view(int(unit.max()) + 1, -1), within)]
    (outer, other), *rest = outer_dims
    rows = units(layouts[other], outer, at=at)
    found: list[Slab] = []
    for index in range(int(rows.max()) + 1):
        where = (rows == index).nonzero().squeeze(1)
        found += _slabs_along(layouts, dim, rest, perm, row, {**at, outer: index}, (*within, (other, where)))
    return found
