"""Layouts with some of their leaves changed: fixed, or under another name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedrebasin.layout import Each, Fixed, Free, Layout, Product, Sum


def map_leaves(layout: Layout, change: Callable[[Free | Fixed], Layout]) -> Layout:
    """The layout with every leaf changed.

    >>> map_leaves(Sum((Free("a", 2), Fixed(3))), lambda leaf: Fixed(leaf.size)).size
    5
    """
    match layout:
        case Sum():
            return Sum(tuple(map_leaves(part, change) for part in layout.parts))
        case Product():
            return Product(tuple(map_leaves(factor, change) for factor in layout.factors))
        case Each():
            return Each(layout.over, tuple(map_leaves(part, change) for part in layout.parts))
        case _:
            return change(layout)


def fix_leaf(end: Free | Fixed, reasons: Mapping[str, str]) -> Free | Fixed:
    """The leaf, fixed if its permutation is listed; it keeps its name for what is over it.

    >>> fix_leaf(Free("a", 3), {"a": "by hand"})
    Fixed(size=3, reason='by hand', name='a')
    """
    if isinstance(end, Fixed) or end.perm not in reasons:
        return end
    return Fixed(end.size, reasons[end.perm], end.perm)


def rename_leaf(end: Free | Fixed, names: Mapping[str, str]) -> Free | Fixed:
    """The leaf with its permutation's, and its outer leaf's, other name.

    >>> rename_leaf(Free("a", 3, over="b"), {"b": "heads"})
    Free(perm='a', size=3, over='heads')
    """
    if isinstance(end, Fixed):
        return end
    return Free(names.get(end.perm, end.perm), end.size, names.get(end.over, end.over))
