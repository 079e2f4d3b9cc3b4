"""What must hold of all tensors at once: families keep their outer leaf in sight, no leaf acts twice on one axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fedrebasin.axes import Kind, Node, fix, flatten, leaves


def drop_dangling_families(tensors: Iterable[Sequence[Node]]) -> None:
    """Make a family's permutations equal where some tensor has its inner leaf but not its outer one."""
    tensors = [list(axes) for axes in tensors]
    changed = True
    while changed:
        changed = False
        for axes in tensors:
            for inner, visible in _visible(axes):
                outer = inner.over.root if inner.over is not None else None
                if outer is None:
                    continue
                nested = outer.over is not None
                if inner.reason or outer.kind is not Kind.LEAF or nested or outer not in visible:
                    inner.over, inner.independent, changed = None, True, True


def fix_repeated_factors(axes: Iterable[Node]) -> None:
    """Fix a leaf that is more than one factor of an axis: there its permutation would act twice."""
    for axis in axes:
        for node in _all_below(axis.root):
            if node.kind is Kind.PRODUCT:
                seen: set[Node] = set()
                for factor in node.children:
                    ends = set(leaves(factor))
                    for end in seen & ends:
                        fix(end, "twice in one axis")
                    seen |= ends


def _all_below(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _all_below(child.root)


def _visible(axes: Sequence[Node]) -> Iterator[tuple[Node, set[Node]]]:
    """Each leaf of a tensor with the leaves whose index is known wherever this leaf's is."""
    tops = [set(_factors_outside_sums(axis)) for axis in axes]
    for dim, axis in enumerate(axes):
        others = set().union(*(top for other, top in enumerate(tops) if other != dim))
        yield from _visible_below(axis.root, others)


def _visible_below(node: Node, known: set[Node]) -> Iterator[tuple[Node, set[Node]]]:
    if node.kind is Kind.LEAF:
        yield node, known
    for child in node.children:
        siblings = [other for other in node.children if other is not child] if node.kind is Kind.PRODUCT else []
        beside = {end for sibling in siblings for end in _factors_outside_sums(sibling)}
        yield from _visible_below(child.root, known | beside)


def _factors_outside_sums(node: Node) -> list[Node]:
    return [factor for factor in flatten(node, Kind.PRODUCT) if factor.kind is Kind.LEAF]
