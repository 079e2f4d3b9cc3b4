"""Tie two axes: one permutation moves both."""

from __future__ import annotations

from fedrebasin.axes.node import Kind, Node, at_index, fix, flatten, mentions
from fedrebasin.axes.refine import cut, split
from fedrebasin.errors import RebasinError


def unify(a: Node, b: Node) -> None:
    """Make one permutation move both axes."""
    a, b = a.root, b.root
    if a is b:
        return
    if a.size != b.size:
        raise RebasinError(f"axes of {a.size} and {b.size} units cannot share a permutation")
    if a.kind is Kind.LEAF or b.kind is Kind.LEAF:
        _bind(*((a, b) if a.kind is Kind.LEAF else (b, a)))
        return
    if Kind.FAMILY in (a.kind, b.kind):
        agree = _unify_families(*((a, b) if a.kind is Kind.FAMILY else (b, a)))
    elif Kind.SUM in (a.kind, b.kind):
        agree = _unify_parts(a, b)
    else:
        agree = _unify_factors(a, b)
    if not agree:
        fix(a, "two layouts that do not fit")
        fix(b, "two layouts that do not fit")
    a, b = a.root, b.root
    if a is not b and not (mentions(a, b) or mentions(b, a)):
        a.join(b)


def collapse(node: Node) -> None:
    """Make the permutations of a family equal."""
    node = node.root
    if node.kind is Kind.FAMILY:
        first, *others = node.children
        for other in others:
            unify(first, other)
        if node.root is not first.root:
            node.root.join(first.root)


def _bind(end: Node, other: Node) -> None:
    """Let the leaf ``end`` stand for ``other``, a leaf or a tree."""
    if end.reason:
        fix(other, end.reason)
    if other.kind is not Kind.LEAF and mentions(other, end):
        fix(other, "an axis that depends on itself")
        fix(end, "an axis that depends on itself")
        return
    end.join(other)


def _unify_families(a: Node, b: Node) -> bool:
    outer = a.over
    assert outer is not None
    if b.kind is Kind.FAMILY and b.over is not None and b.over.root is outer.root:
        pairs = list(zip(a.children, b.children, strict=True))
    else:
        pairs = [(child, at_index(b, outer, index)) for index, child in enumerate(a.children)]
    for one, two in pairs:
        unify(one, two)
    return True


def _unify_parts(a: Node, b: Node) -> bool:
    """Two axes of which at least one is a sum."""
    sizes = _common([_ends(a, Kind.SUM), _ends(b, Kind.SUM)])
    first, second = cut(a, sizes), cut(b, sizes)
    if first is None or second is None:
        factors = b if a.kind is Kind.SUM else a
        sizes = [factor.size for factor in flatten(factors, Kind.PRODUCT)]
        if a.kind is b.kind:
            return False
        first, second = split(a, sizes), split(b, sizes)
    return _unify_pairs(first, second)


def _unify_factors(a: Node, b: Node) -> bool:
    ends = sorted({*_ends(a, Kind.PRODUCT), *_ends(b, Kind.PRODUCT)})
    sizes = []
    for before, after in zip([1, *ends], ends, strict=False):
        if after % before:
            return False
        sizes.append(after // before)
    return _unify_pairs(split(a, sizes), split(b, sizes))


def _ends(node: Node, kind: Kind) -> list[int]:
    result: list[int] = []
    for piece in flatten(node, kind):
        last = result[-1] if result else int(kind is Kind.PRODUCT)
        result.append(last + piece.size if kind is Kind.SUM else last * piece.size)
    return result


def _common(ends: list[list[int]]) -> list[int]:
    points = sorted({point for each in ends for point in each})
    return [after - before for before, after in zip([0, *points], points, strict=False)]


def _unify_pairs(first: list[Node] | None, second: list[Node] | None) -> bool:
    if first is None or second is None:
        return False
    for one, two in zip(first, second, strict=True):  # the outer factor before the inner one
        unify(one, two)
    return True
