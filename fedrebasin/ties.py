"""What the layouts of all tensors say together: the permutations, their shapes, and the axes that each ties."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fedrebasin.errors import RebasinError
from fedrebasin.layout import Each, Fixed, Free, Layout, Product, Sum, has_leaf, leaves, outer_names

Axes = Mapping[str, tuple[Layout, ...]]


class Axis(NamedTuple):
    """One axis of one tensor of the state dict."""

    name: str
    dim: int


def all_leaves(axes: Axes) -> Iterator[Free | Fixed]:
    """The leaves of every axis of every tensor, in order.

    >>> [leaf.size for leaf in all_leaves({"w": (Free("a", 3), Fixed(2)), "b": (Free("a", 3),)})]
    [3, 2, 3]
    """
    for layouts in axes.values():
        for layout in layouts:
            yield from leaves(layout)


def perm_shapes(axes: Axes) -> dict[str, tuple[int, ...]]:
    """The shape of every permutation: ``(n,)``, or ``(outer, n)`` for a family.

    >>> perm_shapes({"w": (Free("heads", 2), Free("units", 8, over="heads"))})
    {'heads': (2,), 'units': (2, 8)}
    """
    found = list(all_leaves(axes))
    sizes = {leaf.perm if isinstance(leaf, Free) else leaf.name: leaf.size for leaf in found}
    return {
        leaf.perm: (sizes[leaf.over], leaf.size) if leaf.over else (leaf.size,)
        for leaf in found
        if isinstance(leaf, Free)
    }


def tied_axes(axes: Axes) -> dict[str, tuple[Axis, ...]]:
    """For every permutation, the axes that it moves.

    >>> tied_axes({"w": (Free("a", 3), Fixed(2)), "b": (Free("a", 3),)})
    {'a': (Axis(name='w', dim=0), Axis(name='b', dim=0))}
    """
    found: dict[str, list[Axis]] = {}
    for name, layouts in axes.items():
        for dim, layout in enumerate(layouts):
            for perm in dict.fromkeys(leaf.perm for leaf in leaves(layout) if isinstance(leaf, Free)):
                found.setdefault(perm, []).append(Axis(name, dim))
    return {perm: tuple(tied) for perm, tied in found.items()}


def log10_order(axes: Axes) -> float:
    """log10 of the number of permutations that keep the network's function.

    >>> round(10 ** log10_order({"w": (Free("a", 3), Fixed(2))}))
    6
    """
    return sum(
        (shape[0] if len(shape) == 2 else 1) * math.lgamma(shape[-1] + 1) / math.log(10)
        for shape in perm_shapes(axes).values()
    )


def check_axes(axes: Axes) -> None:
    """Raise :class:`RebasinError` unless sizes agree and what is over a leaf finds it, with a part for each index.

    >>> check_axes({"w": (Free("a", 3), Fixed(2)), "b": (Free("a", 3),)})
    """
    sizes: dict[str, int] = {}
    for leaf in all_leaves(axes):
        name = leaf.perm if isinstance(leaf, Free) else leaf.name
        if name and sizes.setdefault(name, leaf.size) != leaf.size:
            raise RebasinError(f"spec: {name!r} has {sizes[name]} units on one axis and {leaf.size} on another")
    for name, layouts in axes.items():
        for over in set[str]().union(*(outer_names(layout) for layout in layouts)):
            if not any(has_leaf(layout, over) for layout in layouts):
                raise RebasinError(f"spec: {name!r} depends on {over!r}, which no axis of that tensor has")
        for each in (each for layout in layouts for each in _eaches(layout)):
            found = [part.size for part in each.parts]
            if len(found) != sizes[each.over] or len(set(found)) > 1:
                raise RebasinError(
                    f"spec: {name!r} needs parts of one size for the {sizes[each.over]} indices of {each.over!r}; got "
                    f"parts of {found}"
                )


def _eaches(layout: Layout) -> Iterator[Each]:
    if isinstance(layout, Each):
        yield layout
    match layout:
        case Sum(parts=children) | Product(factors=children) | Each(parts=children):
            for child in children:
                yield from _eaches(child)
