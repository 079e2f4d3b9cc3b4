"""From tied axes to immutable layouts: names for free leaves and families, reasons for what is fixed."""

from __future__ import annotations

from collections.abc import Container, Iterator

from fedrebasin.axes.node import Kind, Node, at_index, concat, family, flatten, is_fixed, leaves, product, reason_of
from fedrebasin.layout import Each, Fixed, Free, Layout, Product, Sum

#: A free leaf, a fixed outer axis, or a family with one permutation for each index of a free outer axis.
Key = Node | tuple[Node, ...]


def freeze_all(tensors: dict[str, list[Node]]) -> dict[str, tuple[Layout, ...]]:
    """The layouts of all tensors; permutations are named after the first module whose weight makes their units."""
    tensors = {name: _spread_all(axes) for name, axes in tensors.items()}
    names: dict[Key, str] = {}
    taken: dict[str, int] = {}
    producing = [(name.rpartition(".")[0] or name, axes[0]) for name, axes in tensors.items() if len(axes) > 1]
    others = [(f"{name}:{dim}", axis) for name, axes in tensors.items() for dim, axis in enumerate(axes)]
    known = -1
    while known < len(names):  # what is over a named axis needs a name, too
        known = len(names)
        for name, axis in producing + others:
            for key in _keys(axis, names):
                if key not in names:
                    taken[name] = taken.get(name, 0) + 1
                    names[key] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return {name: tuple(_freeze(axis, names) for axis in axes) for name, axes in tensors.items()}


def _spread_all(axes: list[Node]) -> list[Node]:
    outer = [set(_outer_axes(axis)) for axis in axes]
    return [
        _spread(axis, set().union(*(needed for other, needed in enumerate(outer) if other != dim)))
        for dim, axis in enumerate(axes)
    ]


def _spread(node: Node, kept: set[Node]) -> Node:
    """Write 3 x [q, k, v] as q + k + v: a product whose fixed first factor decides the order of the others is a sum.

    Not where another axis of the tensor depends on that factor, too.
    """
    node = node.root
    if is_fixed(node):
        return node
    if node.kind is Kind.FAMILY and node.over is not None:  # of what is over the same axis again, one child is left
        outer = node.over.root
        return family(outer, [at_index(_spread(each, kept), outer, i) for i, each in enumerate(node.children)])
    if node.kind is Kind.SUM:
        return concat([_spread(part, kept) for part in node.children])
    if node.kind is not Kind.PRODUCT:
        return node
    first, *others = flatten(node, Kind.PRODUCT)
    if first in kept or not is_fixed(first) or all(at_index(other, first, 0) is other for other in others):
        return node
    others = [_spread(other, kept) for other in others]
    rows = [product([at_index(other, first, index) for other in others]) for index in range(first.size)]
    return concat([_spread(row, kept) for row in rows])


def _outer_axes(node: Node) -> Iterator[Node]:
    node = node.root
    if node.over is not None:
        yield node.over.root
    for child in node.children:
        yield from _outer_axes(child)


def _keys(node: Node, names: Container[Key]) -> Iterator[Key]:
    """What needs a name in an axis, in order."""
    node = node.root
    if is_fixed(node) and not any(below in names for below in _fixed_below(node)):
        return
    if node.kind is Kind.FAMILY and node.over is not None:
        outer = node.over.root
        if is_fixed(outer):
            yield outer
        else:
            yield _family_key(node)
            return
    elif node.free_leaf:
        yield node
    for child in node.children:
        yield from _keys(child, names)


def _family_key(node: Node) -> Key:
    assert node.over is not None
    return (node.over.root, *(child.root for child in node.children))


def _freeze(node: Node, names: dict[Key, str]) -> Layout:
    node = node.root
    outer = node in names
    if is_fixed(node) and (outer or not any(below in names for below in _fixed_below(node))):
        reasons = dict.fromkeys(end.reason for end in leaves(node) if end.reason)
        return Fixed(node.size, "; ".join(reasons) or reason_of(node), names.get(node, ""))
    if node.kind is Kind.SUM:
        return Sum(tuple(_freeze(child, names) for child in flatten(node, Kind.SUM)))
    if node.kind is Kind.PRODUCT:
        return Product(tuple(_freeze(child, names) for child in flatten(node, Kind.PRODUCT)))
    if node.kind is Kind.LEAF:
        return Free(names[node], node.size)
    assert node.over is not None
    if not is_fixed(node.over):
        return Free(names[_family_key(node)], node.size, names[node.over.root])
    parts = tuple(_freeze(child, names) for child in node.children)
    return parts[0] if len(set(parts)) == 1 else Each(names[node.over.root], parts)


def _fixed_below(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _fixed_below(child.root)
