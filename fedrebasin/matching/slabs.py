"""Where in a tensor the units of one permutation lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedrebasin.layout import Layout, has_leaf, units
from fedrebasin.permute import regions


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
            for at, within in regions(layouts, dim):
                unit = units(layout, perm, row=row, at=at)
                where = (unit >= 0).nonzero().squeeze(1)
                if len(where):
                    order = where[unit[where].argsort(stable=True)]
                    found.append(Slab(dim, order.view(int(unit.max()) + 1, -1), tuple(within.items())))
    return found
