"""The grids that a tensor falls apart into, in which a relaxed permutation is one factor of a product.

Each dimension of a grid is one leaf, and no permutation moves an entry from one grid to another. What comes out of
:func:`soft_permute` is linear in each relaxed permutation, and for permutations it is what :func:`fedrebasin.permute`
gives.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fedrebasin.layout import Each, Fixed, Free, Layout, Product, Sum


@dataclass(frozen=True)
class Factor:
    """One relaxed permutation in a grid's product: its letters, and the row of a family that alone is meant."""

    perm: str
    letters: str
    row: int | None = None

    def of(self, relaxed: Mapping[str, Tensor]) -> Tensor:
        """The matrix, or what stands in its place."""
        return relaxed[self.perm] if self.row is None else relaxed[self.perm][self.row]


@dataclass(frozen=True)
class Grid:
    """A part of a tensor: the indices ``places`` along each axis (None: all), as leaves of sizes ``shape``."""

    shape: tuple[int, ...]
    places: tuple[Tensor | None, ...]
    old: str
    new: str
    factors: tuple[Factor, ...]

    def part(self, tensor: Tensor) -> Tensor:
        """The grid's entries of a tensor, one dimension for each leaf; further axes stay last."""
        for dim, index in enumerate(self.places):
            if index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor.reshape((*self.shape, *tensor.shape[len(self.places) :]))

    def apply(self, relaxed: Mapping[str, Tensor], part: Tensor) -> Tensor:
        """The entries after the relaxed permutations."""
        operands = [factor.of(relaxed) for factor in self.factors]
        letters = ",".join([f"{self.old}...", *(factor.letters for factor in self.factors)])
        return torch.einsum(f"{letters}->{self.new}...", part, *operands)

    def similarity(self, reference: Tensor, model: Tensor) -> Tensor:
        """For a grid of one factor: ``<reference, apply(relaxed, model)>`` is linear, and this is its gradient."""
        return torch.einsum(f"{self.new}...,{self.old}...->{self.factors[0].letters}", reference, model)


def soft_permute(grids: Sequence[Grid], relaxed: Mapping[str, Tensor], tensor: Tensor) -> Tensor:
    """A tensor after relaxed permutations, differentiable in them.

    >>> layouts = (Free("a", 2), Fixed(3))
    >>> soft_permute(grids_of(layouts), {"a": torch.full((2, 2), 0.5)}, torch.tensor([[0.0, 1, 2], [4, 5, 6]]))
    tensor([[2., 3., 4.],
            [2., 3., 4.]])
    """
    if len(grids) == 1 and all(index is None for index in grids[0].places):
        return grids[0].apply(relaxed, grids[0].part(tensor)).reshape(tensor.shape)
    result = tensor.flatten()
    where = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    for grid in grids:
        if grid.factors:
            result = result.index_copy(0, grid.part(where).flatten(), grid.apply(relaxed, grid.part(tensor)).flatten())
    return result.view(tensor.shape)


@dataclass(frozen=True)
class _Leaves:
    """A part of one axis: its leaves, and the index along the axis of each combination of their units."""

    leaves: tuple[Free | Fixed, ...]
    index: Tensor


def grids_of(layouts: Sequence[Layout]) -> list[Grid]:
    """A tensor's grids.

    >>> [(grid.shape, grid.old, grid.new) for grid in grids_of((Sum((Free("a", 2), Free("b", 3))), Fixed(4)))]
    [((2, 4), 'ab', 'cb'), ((3, 4), 'ab', 'cb')]
    """
    return [_grid(layouts, parts, at) for at in _indices(layouts, {}) for parts in _combine(layouts, at)]


def _indices(layouts: Sequence[Layout], at: dict[str, int]) -> Iterator[dict[str, int]]:
    """The indices of the fixed leaves on which the tree of some axis depends, one combination after the other."""
    each = next((found for layout in layouts for found in _open(layout, at)), None)
    if each is None:
        yield at
        return
    for index in range(len(each.parts)):
        yield from _indices(layouts, {**at, each.over: index})


def _open(layout: Layout, at: Mapping[str, int]) -> Iterator[Each]:
    match layout:
        case Each():
            if layout.over not in at:
                yield layout
            else:
                yield from _open(layout.parts[at[layout.over]], at)
        case Sum(parts=children) | Product(factors=children):
            for child in children:
                yield from _open(child, at)
        case _:
            pass


def _combine(layouts: Sequence[Layout], at: Mapping[str, int]) -> Iterator[tuple[_Leaves, ...]]:
    if not layouts:
        yield ()
        return
    for first in _parts(layouts[0], at):
        for rest in _combine(layouts[1:], at):
            yield (first, *rest)


def _parts(layout: Layout, at: Mapping[str, int]) -> Iterator[_Leaves]:
    match layout:
        case Fixed() if layout.name in at:
            yield _Leaves((Fixed(1, layout.reason, layout.name),), torch.tensor([at[layout.name]], device="cpu"))
        case Free() | Fixed():
            yield _Leaves((layout,), torch.arange(layout.size, device="cpu"))
        case Each():
            yield from _parts(layout.parts[at[layout.over]], at)
        case Sum():
            starts = accumulate((part.size for part in layout.parts[:-1]), initial=0)
            for start, part in zip(starts, layout.parts, strict=True):
                for found in _parts(part, at):
                    yield _Leaves(found.leaves, found.index + start)
        case Product():
            for factors in _combine(layout.factors, at):
                index = torch.zeros((), dtype=torch.int64, device="cpu")
                for factor, found in zip(layout.factors, factors, strict=True):
                    index = index.reshape(*index.shape, *[1] * found.index.ndim) * factor.size + found.index
                yield _Leaves(tuple(leaf for found in factors for leaf in found.leaves), index)


def _grid(layouts: Sequence[Layout], parts: Sequence[_Leaves], at: Mapping[str, int]) -> Grid:
    ends = [(axis, leaf) for axis, part in enumerate(parts) for leaf in part.leaves]
    names = [(axis, leaf.perm if isinstance(leaf, Free) else leaf.name) for axis, leaf in ends]
    letters = iter(string.ascii_letters)
    old = [next(letters) for _ in ends]
    new = list(old)
    outer: dict[int, int] = {}
    for dim, (axis, leaf) in enumerate(ends):
        if not isinstance(leaf, Free):
            continue
        if leaf.over and leaf.over not in at:
            places = [(other == axis, place) for place, (other, name) in enumerate(names) if name == leaf.over]
            if not places:  # beside the outer leaf's units, where nothing depends on them
                continue
            outer[dim] = max(places)[1]
        new[dim] = next(letters)
    factors = []
    for dim, (_, leaf) in enumerate(ends):
        if new[dim] == old[dim] or dim in outer.values() or not isinstance(leaf, Free):
            continue
        letters_ = new[dim] + old[dim]
        if dim in outer:
            place = outer[dim]
            letters_ = (old[place] if old[place] == new[place] else new[place] + old[place]) + letters_
        factors.append(Factor(leaf.perm, letters_, at.get(leaf.over) if leaf.over else None))
    places_ = [
        None if torch.equal(part.index.flatten(), torch.arange(layout.size, device="cpu")) else part.index.flatten()
        for layout, part in zip(layouts, parts, strict=True)
    ]
    shape = tuple(size for part in parts for size in part.index.shape)
    return Grid(shape, tuple(places_), "".join(old), "".join(new), tuple(factors))
