"""View an axis as a product of factors, or as parts side by side; free leaves are refined in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedrebasin.axes.node import (
    Kind,
    Node,
    concat,
    family,
    flatten,
    is_fixed,
    key_of,
    leaf,
    narrowed,
    product,
    reason_of,
)


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
            else:
                halves = split_in_two(factor, need) if factor.size % need == 0 else None
                if halves is None:
                    return None
                factors.append(halves[0])
                queue.insert(0, halves[1])
                need = 1
        result.append(product(factors))
    return result


def split_in_two(node: Node, outer_size: int) -> tuple[Node, Node] | None:
    """View what is no product as ``outer_size`` times an inner factor, which may depend on the outer one."""
    inner_size = node.size // outer_size
    if is_fixed(node):
        reason = reason_of(node)
        return leaf(outer_size, reason), leaf(inner_size, reason)
    if node.kind is Kind.LEAF:
        outer = leaf(outer_size)
        inner = family(outer, [leaf(inner_size) for _ in range(outer_size)])
        node.become(Kind.PRODUCT, [outer, inner])
        return outer, inner
    if node.kind is Kind.SUM:
        parts = cut(node, [inner_size] * outer_size)
        outer = leaf(outer_size, "parts side by side")
        return None if parts is None else (outer, family(outer, parts))
    pairs = [split(child, [outer_size, inner_size]) for child in node.children]
    found = _all_or_none(pairs)
    if found is None or node.over is None:
        return None
    return family(node.over, [pair[0] for pair in found]), family(node.over, [pair[1] for pair in found])


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
            else:
                pair = _cut_in_two(part, need)
                if pair is None:
                    return None
                queue = pair + queue
        result.append(concat(parts))
    return result


def _cut_in_two(node: Node, size: int) -> list[Node] | None:
    rest = node.size - size
    if node.kind is Kind.LEAF:
        halves = [leaf(size, node.reason), leaf(rest, node.reason)]
        if not node.reason:
            node.become(Kind.SUM, halves)
        return halves
    if node.kind is Kind.FAMILY and node.over is not None:
        found = _all_or_none([cut(child, [size, rest]) for child in node.children])
        return None if found is None else [family(node.over, [pair[dim] for pair in found]) for dim in (0, 1)]
    first, *others = flatten(node, Kind.PRODUCT)
    unit = node.size // first.size
    whole, part_of_unit = divmod(size, unit)
    sizes = [whole, min(1, part_of_unit), first.size - whole - min(1, part_of_unit)]
    key = key_of(first)
    parts = cut(first, sizes)
    if parts is None:
        return None
    starts = (0, whole, whole + sizes[1])
    before, middle, after = (
        product([part, *(narrowed(other, key, start, part.size, part) for other in others)]) if part.size else part
        for start, part in zip(starts, parts, strict=True)
    )
    if not part_of_unit:
        return [before, after]
    ends = cut(middle, [part_of_unit, unit - part_of_unit])  # one unit is cut apart, the others stay whole
    return None if ends is None else [concat([before, ends[0]]), concat([ends[1], after])]


def _all_or_none(found: Iterable[list[Node] | None]) -> list[list[Node]] | None:
    result = []
    for item in found:
        if item is None:
            return None
        result.append(item)
    return result
