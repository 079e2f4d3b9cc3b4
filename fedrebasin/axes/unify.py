"""Tie two axes: one permutation moves both."""

from __future__ import annotations

from collections.abc import Iterable

from fedrebasin.axes.node import ITSELF, TWICE, Kind, Node, at_index, fix, flatten, leaves, mentions
from fedrebasin.axes.refine import cut, split
from fedrebasin.errors import RebasinError


def unify(a: Node, b: Node) -> bool:
    """Make one permutation move both axes.

    Returns
    -------
    bool
        Whether they are one from now on. Otherwise they are fixed where they do not agree, and what is over the one
        must not be taken for what is over the other.
    """
    a, b = a.root, b.root
    if a is b:
        return True
    if a.size != b.size:
        raise RebasinError(f"axes of {a.size} and {b.size} units cannot share a permutation")
    if a.kind is Kind.LEAF or b.kind is Kind.LEAF:
        return _bind(*((a, b) if a.kind is Kind.LEAF else (b, a)))
    if Kind.FAMILY in (a.kind, b.kind):
        one: bool | None = _unify_families(*((a, b) if a.kind is Kind.FAMILY else (b, a)))
    elif Kind.SUM in (a.kind, b.kind):
        one = _unify_parts(a, b)
    else:
        one = _unify_factors(a, b)
    if one is None:
        fix(a, "two layouts that do not fit")
        fix(b, "two layouts that do not fit")
    a, b = a.root, b.root
    if one is not False and a is not b and not (mentions(a, b) or mentions(b, a)):
        a.join(b)
    return bool(one) and a.root is b.root


def collapse(node: Node) -> bool:
    """Make the permutations of a family equal; whether they are one from now on."""
    first, *others = node.root.children
    one = _unify_each([(first, other) for other in others])
    if node.root is not first.root:
        node.root.join(first.root)
    return one


def _unify_each(pairs: Iterable[tuple[Node, Node]]) -> bool:
    """Unify all pairs, whatever becomes of some; whether each became one."""
    found = [unify(one, two) for one, two in pairs]
    return all(found)


def _bind(end: Node, other: Node) -> bool:
    """Let the leaf ``end`` stand for ``other``, a leaf or a tree."""
    if end.reason:
        fix(other, end.reason)
    reason = ""
    if _are_apart(end, other) or _are_apart(other, end):
        reason = TWICE
    elif other.kind is not Kind.LEAF and mentions(other, end):
        reason = ITSELF
    if reason:
        fix(other, reason)
        fix(end, reason)
        return False
    end.join(other)
    return True


def _are_apart(one: Node, other: Node) -> bool:
    return any(found is other for beside in one.apart for found in leaves(beside))


def _unify_families(a: Node, b: Node) -> bool:
    outer = a.over
    assert outer is not None
    if b.kind is Kind.FAMILY and b.over is not None and b.over.root is outer.root:
        pairs = list(zip(a.children, b.children, strict=True))
    else:
        pairs = [(child, at_index(b, outer, index)) for index, child in enumerate(a.children)]
    return _unify_each(pairs)


def _unify_parts(a: Node, b: Node) -> bool | None:
    """Two axes of which at least one is a sum; ``None`` where they do not fit."""
    sizes = _common([_ends(a, Kind.SUM), _ends(b, Kind.SUM)])
    first, second = cut(a, sizes), cut(b, sizes)
    if first is not None and second is not None:
        return _unify_each(zip(first, second, strict=True))
    if a.kind is b.kind:
        return None
    factors = b if a.kind is Kind.SUM else a
    sizes = [factor.size for factor in flatten(factors, Kind.PRODUCT)]
    return _unify_pairs(split(a, sizes), split(b, sizes))


def _unify_factors(a: Node, b: Node) -> bool | None:
    ends = sorted({*_ends(a, Kind.PRODUCT), *_ends(b, Kind.PRODUCT)})
    sizes = []
    for before, after in zip([1, *ends], ends, strict=False):
        if after % before:
            return None
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


def _unify_pairs(first: list[Node] | None, second: list[Node] | None) -> bool | None:
    """The factors of two axes, the outer ones before the inner ones."""
    if first is None or second is None:
        return None
    for place, (one, two) in enumerate(zip(first, second, strict=True), 1):
        if not unify(one, two):
            _unify_inside(one.root, two.root, first[place:], second[place:])
            return False
    return True


def _unify_inside(one: Node, two: Node, first: list[Node], second: list[Node]) -> None:
    """Factors inside two that did not become one: what is over the one meets what is over the other by index."""
    ends = [*leaves(one), *leaves(two)]
    if not any(mentions(factor, end) for factor in (*first, *second) for end in ends):
        _unify_pairs(first, second)
    elif {one.kind, two.kind} <= {Kind.LEAF, Kind.FAMILY}:
        for index in range(one.size):
            _unify_pairs([at_index(a, one, index) for a in first], [at_index(b, two, index) for b in second])
    else:
        for factor in (*first, *second):
            fix(factor, ITSELF)
