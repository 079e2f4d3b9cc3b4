"""Which permutation of one spec is which of another: two networks that have some tensors in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedrebasin.errors import SpecMismatchError
from fedrebasin.layout import Each, Fixed, Free, Layout, Product, Sum, leaves
from fedrebasin.spec import PermutationSpec


def common_perms(
    first: PermutationSpec, second: PermutationSpec, names: Iterable[str], *, sizes: bool = True
) -> dict[str, str]:
    """The permutations that move the same axes of the tensors ``names`` in both specs, by their names in each.

    Parameters
    ----------
    first, second : PermutationSpec
    names : iterable of str
        Tensors that both specs have.
    sizes : bool
        Whether a permutation must have as many units in both.

    Returns
    -------
    dict of str to str
        Without those that one spec fixes, or ties to others than the other does: what is left is free in both.

    Raises
    ------
    SpecMismatchError
        If a tensor is missing, or has other fixed axes.

    Examples
    --------
    >>> first = PermutationSpec({"w": (Free("a", 3), Fixed(2)), "b": (Free("a", 3),)})
    >>> second = PermutationSpec({"w": (Free("x", 3), Fixed(2)), "b": (Free("x", 3),)})
    >>> common_perms(first, second, ["w", "b"])
    {'a': 'x'}
    """
    found: dict[str, str] = {}
    back: dict[str, str] = {}
    lost, lost_back = set[str](), set[str]()
    for name in names:
        layouts = [spec.axes.get(name) for spec in (first, second)]
        if layouts[0] is None or layouts[1] is None or len(layouts[0]) != len(layouts[1]):
            raise SpecMismatchError(f"specs: expected {name!r} in both, with as many axes; use networks of one kind")
        for dim, (one, other) in enumerate(zip(layouts[0], layouts[1], strict=True)):
            pairs = list(_pairs(one, other))
            others = any(isinstance(a, Fixed) and isinstance(b, Fixed) and a.size != b.size for a, b in pairs)
            if others or (sizes and one.size != other.size):
                raise SpecMismatchError(
                    f"specs: expected axis {dim} of {name!r} with as many units in both; got {one.size} and "
                    f"{other.size}; share less, or use networks of one kind"
                )
            for a, b in pairs:
                if isinstance(a, Free) and isinstance(b, Free) and bool(a.over) == bool(b.over):
                    mine, back_mine = found.setdefault(a.perm, b.perm), back.setdefault(b.perm, a.perm)
                    if mine != b.perm or back_mine != a.perm:
                        lost |= {a.perm, back_mine}
                        lost_back |= {b.perm, mine}
                else:
                    lost |= _perms(a)
                    lost_back |= _perms(b)
    while True:  # what is fixed in one spec is fixed in the other, and so on
        more = {a for a, b in found.items() if b in lost_back} - lost
        more_back = {b for a, b in found.items() if a in lost} - lost_back
        if not more and not more_back:
            return {a: b for a, b in found.items() if a not in lost and b not in lost_back}
        lost |= more
        lost_back |= more_back


def _pairs(one: Layout, other: Layout) -> Iterator[tuple[Layout, Layout]]:
    """Leaves that stand in the same place; where two layouts are built otherwise, the layouts."""
    match one, other:
        case (Sum(parts=a), Sum(parts=b)) | (Product(factors=a), Product(factors=b)) if len(a) == len(b):
            for part, counterpart in zip(a, b, strict=True):
                yield from _pairs(part, counterpart)
        case (Each(parts=a), Each(parts=b)) if len(a) == len(b):
            for part, counterpart in zip(a, b, strict=True):
                yield from _pairs(part, counterpart)
        case _:
            yield one, other


def _perms(layout: Layout) -> set[str]:
    return {leaf.perm for leaf in leaves(layout) if isinstance(leaf, Free)}
