"""The axes of a traced network while they are being tied: union-find over small trees, refined in place.

A node describes the order of ``size`` units along one axis::

    leaf      one permutation moves the units freely, or a reason keeps them fixed
    sum       parts side by side                      concat: 64 stem channels | 32 | 32
    product   factors, the outermost first            flatten: channels x 49 pixels
    family    one child for each index of ``over``    units within each head, or within each group

    in_proj.weight dim 0 = 3 x family over 3 [ heads x family over heads [ 64 ] ]     (query, key, value)

``unify`` says that two axes are moved by the same permutation. Where their trees differ, leaves are refined
(cut into a sum, split into a product whose inner factor is a family) until they agree; trees that cannot agree
are fixed, which is always correct. What becomes of a family whose outer axis is out of sight is told in
:mod:`fedrebasin.axes.families`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import ClassVar

#: Why an axis stays that would have to move in two ways at once.
TWICE, OVER_TWICE = "twice in one axis", "over an axis that is twice in one axis"
ITSELF = "an axis that depends on itself"


class Kind(Enum):
    """What a node is; a leaf may become anything else later."""

    LEAF = "leaf"
    SUM = "sum"
    PRODUCT = "product"
    FAMILY = "family"


class Node:
    """One axis, or a part, factor or child of one. Use the functions below; fields change as axes are tied."""

    __slots__ = ("apart", "children", "kind", "normal_at", "over", "parent", "reason", "size")

    #: Another object after every change of any node: a family in normal form stays so for as long as this lasts.
    moment: ClassVar[object] = object()

    def __init__(
        self,
        size: int,
        *,
        reason: str = "",
        kind: Kind = Kind.LEAF,
        children: Sequence[Node] = (),
        over: Node | None = None,
    ) -> None:
        self.size = size
        self.reason = reason  # why a leaf is fixed; empty while it is free
        self.kind = kind
        self.children = list(children)
        self.over = over  # of a family
        self.parent: Node | None = None
        self.normal_at: object = None
        self.apart: list[Node] = []  # of a leaf: others in the same axis, with which it must not become one

    def become(self, kind: Kind, children: Sequence[Node], over: Node | None = None) -> None:
        """Be another tree from now on."""
        self.kind, self.children, self.over = kind, list(children), over
        for child in children if self.apart else ():
            child.apart += self.apart
        Node.moment = object()

    def join(self, other: Node) -> None:
        """Let ``other`` stand for this node from now on."""
        self.parent = other
        other.apart += self.apart
        Node.moment = object()

    @property
    def root(self) -> Node:
        """The node that stands for this one after all unifications so far, families in their normal form."""
        node = self
        while node.parent is not None:
            if node.parent.parent is not None:
                node.parent = node.parent.parent
            node = node.parent
        return _normal_form(node) if node.kind is Kind.FAMILY and node.normal_at is not Node.moment else node

    @property
    def free_leaf(self) -> bool:
        """Whether this is a leaf that may be permuted."""
        return self.kind is Kind.LEAF and not self.reason and self.size > 1


def leaf(size: int, reason: str = "") -> Node:
    """A free axis, or one that is fixed for ``reason``."""
    return Node(size, reason=reason)


def concat(parts: Sequence[Node]) -> Node:
    """The axis of a concatenation."""
    flat = [part for node in parts for part in flatten(node, Kind.SUM) if part.size > 0]
    if not flat:
        return leaf(0, "empty")
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


def family(over: Node, children: Sequence[Node]) -> Node:
    """The axis whose order is that of ``children[i]`` where the axis ``over`` has index ``i``."""
    roots = [child.root for child in children]
    if all(child is roots[0] for child in roots):
        return roots[0]
    if all(child.kind is Kind.LEAF and child.reason for child in roots):
        return leaf(roots[0].size, roots[0].reason)
    return Node(roots[0].size, kind=Kind.FAMILY, children=roots, over=over).root


def depend(node: Node, outer: Sequence[Node]) -> None:
    """Give a free leaf a permutation of its own for each index of the axes ``outer``."""
    node, over = node.root, product(outer)
    if node.free_leaf and over.size > 1 and not mentions(over, node):
        node.become(Kind.FAMILY, [leaf(node.size) for _ in range(over.size)], over)


def mentions(node: Node, sought: Node) -> bool:
    """Whether ``sought`` is below ``node``, or an axis that something below ``node`` is over."""
    node = node.root
    if node is sought:
        return True
    if node.kind is Kind.FAMILY and node.over is not None and mentions(node.over, sought):
        return True
    return any(mentions(child, sought) for child in node.children)


def leaves(node: Node) -> Iterator[Node]:
    """All leaves below ``node``, in order."""
    node = node.root
    if node.kind is Kind.LEAF:
        yield node
    for child in node.children:
        yield from leaves(child)


def flatten(node: Node, kind: Kind) -> list[Node]:
    """The parts of a sum or the factors of a product, however nested; any other node alone."""
    node = node.root
    if node.kind is not kind:
        return [node]
    return [end for child in node.children for end in flatten(child, kind)]


def is_fixed(node: Node) -> bool:
    """Whether no permutation moves the axis."""
    return not any(end.free_leaf for end in leaves(node))


def reason_of(node: Node) -> str:
    """Why a fixed axis is fixed; one unit needs no other reason."""
    alone = "size 1" if node.size == 1 else "parts of one unit each"
    return next((end.reason for end in leaves(node) if end.reason), alone)


def fix(node: Node, reason: str) -> None:
    """Forbid every permutation of the axis."""
    for end in leaves(node):
        end.reason = end.reason or reason


Key = Node | tuple[Node, tuple["Key", ...]]


def key_of(outer: Node) -> Key:
    """What names an axis in :func:`narrowed`, taken before the axis is cut."""
    outer = outer.root
    if outer.kind is Kind.FAMILY and outer.over is not None:
        return outer.over.root, tuple(key_of(child) for child in outer.children)
    return outer


def narrowed(node: Node, outer: Key, start: int, length: int, part: Node) -> Node:
    """The axis where only the units from ``start`` of the axis ``outer`` are left; ``part`` stands for those."""
    node, part = node.root, part.root
    if node.kind is Kind.LEAF:
        return node
    if node.kind is Kind.FAMILY and node.over is not None:
        over = node.over.root
        if over is outer:
            return family(part, node.children[start : start + length])
        if isinstance(outer, tuple) and over is outer[0]:
            parts = part.children if part.kind is Kind.FAMILY and part.over is over else [part] * over.size
            pairs = zip(node.children, outer[1], parts, strict=True)
            return family(over, [narrowed(child, key, start, length, own) for child, key, own in pairs])
    children = [narrowed(child, outer, start, length, part) for child in node.children]
    if all(new is old.root for new, old in zip(children, node.children, strict=True)):
        return node
    if node.kind is Kind.FAMILY and node.over is not None:
        return family(node.over, children)
    return concat(children) if node.kind is Kind.SUM else product(children)


def at_index(node: Node, outer: Node, index: int) -> Node:
    """The axis where the axis ``outer`` has this index."""
    return narrowed(node, key_of(outer), index, 1, leaf(1, "size 1"))


def spread(node: Node, kind: Kind) -> bool:
    """Make a family of products a product of families, or of sums a sum; all children must have the same sizes."""
    assert node.over is not None
    if any(child.root.kind is not kind for child in reversed(node.children)):
        return False
    pieces = [flatten(child, kind) for child in node.children]
    sizes = [piece.size for piece in pieces[0]]
    if any([piece.size for piece in other] != sizes for other in pieces):
        return False
    over = node.over
    node.become(kind, [family(over, [other[i] for other in pieces]) for i in range(len(sizes))])
    return True


def _normal_form(node: Node) -> Node:
    """A family over a leaf or a sum, whose children are not all products of the same sizes."""
    assert node.over is not None
    moment, over = Node.moment, node.over.root
    if over.size == 1:
        node.join(node.children[0].root)
    elif over.kind is Kind.PRODUCT:
        first, others = over.children[0].root, over.children[1:]
        step = over.size // first.size
        inner = [product([at_index(other, first, index) for other in others]) for index in range(first.size)]
        rows = [family(each, node.children[i * step : (i + 1) * step]) for i, each in enumerate(inner)]
        node.become(Kind.FAMILY, rows, first)
    elif over.kind is Kind.FAMILY and over.over is not None:
        node.become(Kind.FAMILY, [family(each, node.children) for each in over.children], over.over)
    elif all(child.root is node.children[0].root for child in node.children):
        node.join(node.children[0].root)
    elif not spread(node, Kind.PRODUCT):
        if moment is Node.moment:  # else the children were still changing
            node.normal_at = moment
        return node
    return node.root
