"""The axes of a traced network while they are being tied: union-find over small trees, refined in place.

A node describes the order of ``size`` units along one axis::

    leaf      one permutation moves the units freely, or a reason keeps them fixed
    sum       parts side by side                      concat: 64 stem channels | 32 | 32
    product   factors, the outermost first            flatten: channels x 49 pixels

``unify`` says that two axes are moved by the same permutation. Where their trees differ, leaves are refined
(cut into a sum, split into a product) until they agree; trees that cannot agree are fixed, which is always
correct. A leaf may have its own permutation for each index of another leaf, its ``over``: then it is a
*family* (units within each group of a grouped convolution; see :mod:`fedrebasin.families`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum


class Kind(Enum):
    """What a node is; a leaf may become a sum or a product later."""

    LEAF = "leaf"
    SUM = "sum"
    PRODUCT = "product"


class Node:
    """One axis, or a part or factor of one. Use the functions below; fields change as axes are tied."""

    __slots__ = ("children", "independent", "kind", "over", "parent", "reason", "size")

    def __init__(self, size: int, *, reason: str = "", kind: Kind = Kind.LEAF, children: Sequence[Node] = ()) -> None:
        self.size = size
        self.reason = reason  # why a leaf is fixed; empty while it is free
        self.kind = kind
        self.children = list(children)
        self.parent: Node | None = None
        self.over: Node | None = None
        self.independent = False  # True once a dependence on an outer leaf was ruled out

    @property
    def root(self) -> Node:
        """The node that stands for this one after all unifications so far."""
        node = self
        while node.parent is not None:
            if node.parent.parent is not None:
                node.parent = node.parent.parent
            node = node.parent
        return node


def leaf(size: int, reason: str = "") -> Node:
    """A free axis, or one that is fixed for ``reason``."""
    return Node(size, reason=reason)


def concat(parts: Sequence[Node]) -> Node:
    """The axis of a concatenation."""
    flat = [part for node in parts for part in flatten(node, Kind.SUM) if part.size > 0]
    return flat[0] if len(flat) == 1 else Node(sum(part.size for part in flat), kind=Kind.SUM, children=flat)


def product(factors: Sequence[Node]) -> Node:
    """The axis of a flatten, the outermost factor first."""
    flat = [factor for node in factors for factor in flatten(node, Kind.PRODUCT) if factor.size != 1]
    if not flat:
        return leaf(1, "size 1")
    size = 1
    for factor in flat:
        size *= factor.size
    return flat[0] if len(flat) == 1 else Node(size, kind=Kind.PRODUCT, children=flat)


def leaves(node: Node) -> Iterator[Node]:
    """All leaves below ``node``, in order."""
    node = node.root
    if node.kind is Kind.LEAF:
        yield node
    for child in node.children:
        yield from leaves(child)


def fix(node: Node, reason: str) -> None:
    """Forbid every permutation of the axis."""
    for end in leaves(node):
        end.reason = end.reason or reason


def unify(a: Node, b: Node) -> None:
    """Make one permutation move both axes."""
    a, b = a.root, b.root
    if a is b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of {a.size} and {b.size} units cannot share a permutation")
    if a.kind is Kind.LEAF:
        _bind(a, b)
    elif b.kind is Kind.LEAF:
        _bind(b, a)
    else:
        agree = a.kind is b.kind and (_unify_sums(a, b) if a.kind is Kind.SUM else _unify_products(a, b))
        if not agree:
            fix(a, "two layouts that do not fit")
            fix(b, "two layouts that do not fit")
        elif a.root is not b.root:
            a.root.parent = b.root


def split(node: Node, sizes: Sequence[int]) -> list[Node] | None:
    """View the axis as a product of factors of these sizes; ``None`` where its tree does not allow it."""
    queue = flatten(node, Kind.PRODUCT)
    result = []
    for size in sizes:
        factors: list[Node] = []
        need = size
        while need > 1:
            if not queue:
                return None
            factor = queue.pop(0).root
            if factor.kind is Kind.PRODUCT:
                queue = flatten(factor, Kind.PRODUCT) + queue
            elif need % factor.size == 0:
                factors.append(factor)
                need //= factor.size
            elif factor.size % need == 0 and factor.kind is Kind.LEAF:
                outer, inner = _split_leaf(factor, need)
                factors.append(outer)
                queue.insert(0, inner)
                need = 1
            else:
                return None
        result.append(product(factors))
    return result


def cut(node: Node, sizes: Sequence[int]) -> list[Node] | None:
    """View the axis as parts of these sizes side by side; ``None`` where its tree does not allow it."""
    queue = flatten(node, Kind.SUM)
    result = []
    for size in sizes:
        parts: list[Node] = []
        need = size
        while need > 0:
            part = queue.pop(0).root
            if part.kind is Kind.SUM:
                queue = flatten(part, Kind.SUM) + queue
            elif part.size <= need:
                parts.append(part)
                need -= part.size
            elif part.kind is Kind.LEAF:
                queue = _cut_leaf(part, need) + queue
            else:
                return None
        result.append(concat(parts) if parts else leaf(0, "empty"))
    return result


def flatten(node: Node, kind: Kind) -> list[Node]:
    """The parts of a sum or the factors of a product, however nested; any other node alone."""
    node = node.root
    if node.kind is not kind:
        return [node]
    return [end for child in node.children for end in flatten(child, kind)]


def _bind(end: Node, other: Node) -> None:
    """Let the leaf ``end`` stand for ``other``, a leaf or a tree."""
    if end.reason:
        fix(other, end.reason)
    ends = list(leaves(other))
    for target in ends:
        mine = end.over.root if end.over is not None else None
        theirs = target.over.root if target.over is not None else None
        conflict = mine is not None and theirs is not None and mine is not theirs and other.kind is Kind.LEAF
        if end.independent or target.independent or conflict:
            target.over, target.independent = None, True
        elif theirs is None and mine is not None and mine not in ends:
            target.over = mine
    end.parent = other


def _split_leaf(end: Node, outer_size: int) -> tuple[Node, Node]:
    outer, inner = leaf(outer_size, end.reason), leaf(end.size // outer_size, end.reason)
    outer.over, outer.independent = end.over, end.independent
    inner.over = outer
    end.kind, end.children, end.over = Kind.PRODUCT, [outer, inner], None
    return outer, inner


def _cut_leaf(end: Node, size: int) -> list[Node]:
    parts = [leaf(size, end.reason), leaf(end.size - size, end.reason)]
    for part in parts:
        part.over, part.independent = end.over, end.independent
    end.kind, end.children, end.over = Kind.SUM, parts, None
    return parts


def _unify_sums(a: Node, b: Node) -> bool:
    for kept, other in ((a, b), (b, a)):
        sizes = [part.size for part in flatten(kept, Kind.SUM)]
        if cut(other, sizes) is None:
            return False
    return _unify_pairs(flatten(a, Kind.SUM), flatten(b, Kind.SUM))


def _unify_products(a: Node, b: Node) -> bool:
    for kept, other in ((a, b), (b, a)):
        sizes = [factor.size for factor in flatten(kept, Kind.PRODUCT)]
        if split(other, sizes) is None:
            return False
    return _unify_pairs(flatten(a, Kind.PRODUCT), flatten(b, Kind.PRODUCT))


def _unify_pairs(first: list[Node], second: list[Node]) -> bool:
    if [node.size for node in first] != [node.size for node in second]:
        return False
    for one, two in zip(first, second, strict=True):  # the outer factor before the inner one
        unify(one, two)
    return True
