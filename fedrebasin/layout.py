"""The layout of one axis of a tensor: which of its units which permutation moves. Immutable.

::

    Free("fc1", 512)                          512 units moved by the permutation "fc1"
    Fixed(10, "output")                       10 units that stay
    Sum((Free("stem", 64), Free("x", 32)))    concat: 64 units, then 32
    Product((Free("conv5", 512), Fixed(49)))  flatten: unit c, pixel p is index 49 * c + p
    Free("inner", 4, over="groups")           a family: its own permutation for each index of "groups"
    Each("halves", (Free("a", 8), Free("b", 8)))   where the fixed axis "halves" has index 0, or 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Each:
    """``parts[i]`` holds where the fixed leaf named ``over``, a factor here or an axis beside it, has index ``i``."""

    over: str
    parts: tuple[Layout, ...]

    @cached_property
    def size(self) -> int:
        """Number of units."""
        return self.parts[0].size


Layout = Free | Fixed | Sum | Product | Each


def leaves(layout: Layout) -> Iterator[Free | Fixed]:
    """All leaves of a layout, in order.

    >>> [leaf.size for leaf in leaves(Product((Free("c", 8), Fixed(49))))]
    [8, 49]
    """
    match layout:
        case Sum(parts=children) | Product(factors=children) | Each(parts=children):
            for child in children:
                yield from leaves(child)
        case _:
            yield layout


def outer_names(layout: Layout) -> set[str]:
    """The leaves, in this axis or beside it, on whose index the order along the axis depends.

    >>> outer_names(Product((Free("heads", 2), Free("units", 8, over="heads"))))
    {'heads'}
    """
    match layout:
        case Free():
            return {layout.over} if layout.over else set()
        case Fixed():
            return set()
        case Each():
            return {layout.over}.union(*(outer_names(part) for part in layout.parts))
        case Sum(parts=children) | Product(factors=children):
            return set[str]().union(*(outer_names(child) for child in children))


def has_leaf(layout: Layout, name: str) -> bool:
    """Whether a permutation or a named fixed leaf occurs in the layout."""
    return any(name == (end.perm if isinstance(end, Free) else end.name) for end in leaves(layout))


def units(layout: Layout, name: str, *, row: int | None = None, at: Mapping[str, int] = MappingProxyType({})) -> Tensor:
    """Which unit of one leaf lies at each index along the axis.

    Parameters
    ----------
    layout : Layout
    name : str
        A permutation, or the name of a fixed leaf.
    row : int, optional
        Of a family, only the units at this index of its outer leaf.
    at : dict of str to int
        Indices of outer leaves that lie on other axes.

    Returns
    -------
    Tensor, shape (size,), int64
        -1 where the leaf does not occur.

    Examples
    --------
    >>> units(Product((Free("c", 2), Fixed(3))), "c")
    tensor([0, 0, 0, 1, 1, 1])
    """
    match layout:
        case Free():
            mine = layout.perm == name and (row is None or at.get(layout.over) == row)
            return _indices(layout.size, mine)
        case Fixed():
            return _indices(layout.size, layout.name == name)
        case Each():
            if layout.over == name:  # what depends on a leaf does not hold it
                return _indices(layout.size, False)
            return units(layout.parts[at[layout.over]], name, row=row, at=at)
        case Sum():
            return torch.cat([units(part, name, row=row, at=at) for part in layout.parts])
        case Product():
            outer = own_outer(layout, at, sought=name)
            if outer is not None:
                return per_index(layout, outer, at, lambda inside: units(layout, name, row=row, at=inside))
            shape = [factor.size for factor in layout.factors]
            found = torch.full(shape, -1, device="cpu")
            for dim, factor in enumerate(layout.factors):
                own = units(factor, name, row=row, at=at).view([-1 if d == dim else 1 for d in range(len(shape))])
                found = torch.where(own >= 0, own, found)
            return found.flatten()


def _indices(size: int, mine: bool) -> Tensor:
    return torch.arange(size, device="cpu") if mine else torch.full((size,), -1, device="cpu")


def axis_mask(layout: Layout, present: Mapping[str, Tensor]) -> Tensor:
    """Which units along an axis are there, if of each permutation only those units are."""
    match layout:
        case Free(perm=perm) if perm in present:
            return present[perm]
        case Sum(parts=parts):
            return torch.cat([axis_mask(part, present) for part in parts])
        case Product(factors=factors):
            mask = torch.ones(1, dtype=torch.bool, device="cpu")
            for factor in factors:
                mask = (mask.unsqueeze(1) & axis_mask(factor, present)).flatten()
            return mask
        case _:
            return torch.ones(layout.size, dtype=torch.bool, device="cpu")


def unknown_outers(layout: Layout, at: Mapping[str, int], *, sought: str = "") -> Iterator[str]:
    """Leaves on other axes on whose index the order depends, where only indices ``at`` are known; outer ones first.

    What depends on the leaf ``sought`` is passed over.

    >>> list(unknown_outers(Each("halves", (Free("a", 8), Free("b", 8))), {}))
    ['halves']
    """
    match layout:
        case Free() if layout.over and layout.over not in at:
            yield layout.over
        case Each() if layout.over in at:
            yield from unknown_outers(layout.parts[at[layout.over]], at, sought=sought)
        case Each() if layout.over != sought:
            yield layout.over
            for part in layout.parts:
                yield from unknown_outers(part, at, sought=sought)
        case Sum():
            for part in layout.parts:
                yield from unknown_outers(part, at, sought=sought)
        case Product():
            own = _own_names(layout)
            for factor in layout.factors:
                yield from (name for name in unknown_outers(factor, at, sought=sought) if name not in own)


def own_outer(layout: Product, at: Mapping[str, int], *, sought: str = "") -> str | None:
    """A factor on whose index other factors depend and whose index is not known yet."""
    own = _own_names(layout) - {sought}
    names = (name for factor in layout.factors for name in unknown_outers(factor, at, sought=sought))
    return next((name for name in names if name in own), None)


def _own_names(layout: Product) -> set[str]:
    """The factors on whose index other factors may depend."""
    waiting: list[Layout] = list(layout.factors)
    names = set()
    while waiting:
        factor = waiting.pop()
        if isinstance(factor, Each):
            waiting += factor.parts
        elif isinstance(factor, Product):
            waiting += factor.factors
        elif isinstance(factor, Free | Fixed):
            names.add(factor.perm if isinstance(factor, Free) else factor.name)
    return names


def per_index(layout: Layout, outer: str, at: Mapping[str, int], of: Callable[[dict[str, int]], Tensor]) -> Tensor:
    """Put together, along one axis, what ``of`` says for each index of its own leaf ``outer``."""
    where = units(layout, outer, at={**at, outer: 0})
    found = torch.arange(layout.size, device="cpu")
    for index in range(int(where.max()) + 1):
        found = torch.where(where == index, of({**at, outer: index}), found)
    return found
