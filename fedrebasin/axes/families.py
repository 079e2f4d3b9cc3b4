"""What must hold of all tensors at once before the trees are final.

A family needs its outer axis in sight in every tensor that has it: a tensor without the heads cannot know which
head's order to follow. And a permutation moves the units of one axis only: a leaf that is twice in one axis, or
a family that is used in two ways, must give up some freedom.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import product

from fedrebasin.axes.node import (
    ITSELF,
    OVER_TWICE,
    TWICE,
    Kind,
    Node,
    at_index,
    fix,
    flatten,
    is_fixed,
    leaves,
    mentions,
    spread,
)
from fedrebasin.axes.unify import collapse

Context = tuple[tuple[Node, int], ...]


def settle(tensors: Iterable[Sequence[Node]]) -> None:
    """Give up the freedom that some tensor does not allow, and no more, until nothing changes."""
    tensors = [list(axes) for axes in tensors]
    _fix_repeated_factors(axis for axes in tensors for axis in axes)
    for axis in {axis.root for axes in tensors for axis in axes}:
        _spread_sums(axis)
    changed = True
    while changed:
        changed = _collapse_dangling(tensors) or _fix_outer_axes({axis.root for axes in tensors for axis in axes})


def settle_op(tensors: Sequence[Sequence[Node]], unlike: Sequence[tuple[Node, Node]]) -> None:
    """Settle, for the tensors of one op, what would grow from op to op if it waited for the end.

    A family over an axis that is out of sight would become a family of families, and so on. Factors of one axis must
    not become one later, for then nobody knows which of them a family is over; nor may anything in the op be over
    axes that it tied and that did not become one (``unlike``).
    """
    for pair in unlike:
        apart = {axis.root for axis in pair}
        for axis in {axis.root for axes in tensors for axis in axes}:
            _fix_over(axis, {end for each in apart for end in leaves(each)}, apart)
    _collapse_dangling(tensors)
    for axis in {axis.root for axes in tensors for axis in axes}:
        factors = {factor for factor in flatten(axis, Kind.PRODUCT) if factor.kind is Kind.LEAF}
        for one, other in product(factors, leaves(axis) if axis.children else ()):
            if one is not other and all(each.root is not other for each in one.apart):
                one.apart.append(other)


def _fix_over(node: Node, outer: set[Node], passed: set[Node]) -> None:
    """Fix the families over some of these leaves; what is in ``passed`` has been seen to."""
    node = node.root
    if node in passed:
        return
    if node.over is not None and not outer.isdisjoint(leaves(node.over)):
        fix(node, ITSELF)
    for child in node.children:
        _fix_over(child, outer, passed)


def _collapse_dangling(tensors: Iterable[Sequence[Node]]) -> bool:
    """Collapse every family whose outer axis is out of sight in some tensor; whether there were any."""
    clean: set[tuple[Node, ...]] = set()
    changed = False
    for axes in tensors:
        while (dangling := _dangling(axes, clean)) is not None:
            if not collapse(dangling):
                for axis in axes:
                    _flatten(axis.root)
            clean.clear()
            changed = True
    return changed


def _flatten(node: Node) -> None:
    """Fix an axis and forget its tree."""
    fix(node, ITSELF)
    if node.children:
        node.become(Kind.LEAF, [])
        node.reason = ITSELF


def _spread_sums(node: Node) -> None:
    """Units within each head that are cut apart: one family for each part."""
    node = node.root
    if node.kind is Kind.FAMILY and node.over is not None and node.over.root.free_leaf:
        spread(node, Kind.SUM)
    for child in node.children:
        _spread_sums(child)


def _dangling(axes: Sequence[Node], clean: set[tuple[Node, ...]]) -> Node | None:
    """A family whose outer axis this tensor lacks, or has twice, so that it cannot tell which index chooses.

    Tensors that have none are added to ``clean``, and passed over there.
    """
    key = tuple(axis.root for axis in axes)
    if key in clean:
        return None
    for dim, axis in enumerate(key):
        if _has_family(axis):
            others = [top for other in (*key[:dim], *key[dim + 1 :]) for top in flatten(other, Kind.PRODUCT)]
            found = _search(axis, {top for top, count in Counter(others).items() if count == 1}, key, clean)
            if found is not None:
                return found
    clean.add(key)
    return None


def _search(node: Node, visible: set[Node], axes: Sequence[Node], clean: set[tuple[Node, ...]]) -> Node | None:
    if node.kind is Kind.FAMILY and node.over is not None:
        outer = node.over.root
        if outer not in visible:
            return node
        if any(map(_has_family, node.children)):
            cut = [mentions(axis, outer) for axis in axes]
            for index in range(outer.size):
                inside = [
                    at_index(axis, outer, index) if touched else axis for axis, touched in zip(axes, cut, strict=True)
                ]
                found = _dangling(inside, clean)
                if found is not None:
                    return found
        return None
    children = flatten(node, node.kind) if node.children else []
    for child in children:
        beside = {other for other in children if other is not child} if node.kind is Kind.PRODUCT else set()
        twice = {other for other in visible & beside if is_fixed(other)}  # here and beside the tensor's other axes
        found = _search(child, (visible | beside) - twice, axes, clean)
        if found is not None:
            return found
    return None


def _has_family(node: Node) -> bool:
    node = node.root
    return node.kind is Kind.FAMILY or any(map(_has_family, node.children))


def _fix_outer_axes(axes: set[Node]) -> bool:
    """Fix the outer axes of families that cannot move with them; whether there were any."""
    uses: dict[Node, set[Context]] = {}
    doubtful: set[Node] = set()
    fixed = cache(is_fixed)
    seen: set[tuple[Node, Context]] = set()
    for axis in axes:
        for node, context in _walk(axis, (), seen):
            free = tuple((outer, index) for outer, index in context if not fixed(outer))
            if node.kind is Kind.LEAF:
                uses.setdefault(node, set()).add(free)
            elif node.over is not None and not fixed(node.over.root) and not fixed(node):
                outer, children = node.over.root, [child.root for child in node.children]
                alike = len({(child.kind, bool(child.reason)) for child in children}) == 1
                if outer.kind is not Kind.LEAF or children[0].kind is not Kind.LEAF or not alike:
                    doubtful.add(outer)
    for contexts in uses.values():
        if len(contexts) > 1:  # in two places of one family, or in two families
            doubtful |= {outer for context in contexts for outer, _ in context}
        doubtful |= {context[-1][0] for context in contexts if len(context) > 1}  # families within families
    for outer in doubtful:
        fix(outer, "what depends on it is used in another way, too")
    return bool(doubtful)


def _walk(node: Node, context: Context, seen: set[tuple[Node, Context]]) -> Iterator[tuple[Node, Context]]:
    """Families and free leaves, with the indices of outer axes at which they hold; what was seen is passed over."""
    node = node.root
    if (node, context) in seen:
        return
    seen.add((node, context))
    if node.free_leaf or node.kind is Kind.FAMILY:
        yield node, context
    for index, child in enumerate(node.children):
        inside = (*context, (node.over.root, index)) if node.over is not None else context
        yield from _walk(child, inside, seen)


def _fix_repeated_factors(axes: Iterable[Node]) -> None:
    """Fix what is in more than one factor of an axis: a permutation would act twice, an outer index is two indices."""
    nodes = all_below(axes)
    repeated: set[Node] = set()
    for node in nodes:
        if node.kind is Kind.PRODUCT:
            seen: set[Node] = set()
            for factor in node.children:
                inside = all_below([factor])
                repeated |= seen & inside
                seen |= inside
    for node in nodes:
        if node in repeated and node.free_leaf:
            fix(node, TWICE)
        elif node.over is not None and node.over.root in repeated:
            fix(node, OVER_TWICE)


def all_below(axes: Iterable[Node]) -> set[Node]:
    """The axes and all that is below them."""
    found: set[Node] = set()
    waiting = [axis.root for axis in axes]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [child.root for child in node.children]
    return found
