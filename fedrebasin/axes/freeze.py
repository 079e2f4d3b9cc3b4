"""From tied axes to immutable layouts: names for free leaves, reasons for fixed ones."""

from __future__ import annotations

from fedrebasin.axes import Kind, Node, leaves
from fedrebasin.layout import Fixed, Free, Layout, Product, Sum


def name_leaves(tensors: dict[str, list[Node]]) -> dict[Node, str]:
    """Name each free leaf after the first module whose weight produces its units."""
    names: dict[Node, str] = {}
    taken: dict[str, int] = {}
    producing = [(name, axes[0]) for name, axes in tensors.items() if len(axes) > 1]
    others = [(f"{name}:{dim}", axis) for name, axes in tensors.items() for dim, axis in enumerate(axes)]
    over = {end.over.root for axes in tensors.values() for axis in axes for end in leaves(axis) if end.over is not None}
    for name, axis in [(name.rpartition(".")[0] or name, axis) for name, axis in producing] + others:
        for end in leaves(axis):
            if end not in names and end.size > 1 and (not end.reason or end in over):
                taken[name] = taken.get(name, 0) + 1
                names[end] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names


def freeze(node: Node, names: dict[Node, str]) -> Layout:
    """The immutable layout of an axis."""
    node = node.root
    if node.kind is Kind.SUM:
        return Sum(tuple(freeze(child, names) for child in node.children))
    if node.kind is Kind.PRODUCT:
        return Product(tuple(freeze(child, names) for child in node.children))
    if node.reason or node.size == 1:
        return Fixed(node.size, node.reason or "size 1", names.get(node, ""))
    return Free(names[node], node.size, names[node.over.root] if node.over is not None else "")
