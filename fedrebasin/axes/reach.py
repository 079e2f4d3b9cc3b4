"""Parts of parameters that no op reads: no graph shows what they go with (positions beyond the inputs' length)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from fedrebasin.axes.families import all_below
from fedrebasin.axes.node import Kind, Node, fix, leaves
from fedrebasin.axes.unify import collapse

#: The axes of each argument of an op, and those of each result.
Read = tuple[list[list[Node]], list[list[Node]]]

_WHY = "not reached by the example inputs"


def fix_unread(tensors: Mapping[str, Sequence[Node]], reads: Iterable[Read]) -> list[str]:
    """Fix what the example inputs do not reach; the names of the tensors that it is in.

    Where it is only at some indices of an outer axis (some layers of many), it is tied to the others.
    """
    rest = _unread(tensors.values(), reads)
    names = [name for name, axes in tensors.items() if any(end in rest for axis in axes for end in leaves(axis))]
    nodes = all_below(axis for axes in tensors.values() for axis in axes) if rest else set()
    for node in [node for node in nodes if node.kind is Kind.FAMILY and not rest.isdisjoint(leaves(node))]:
        ends = list(leaves(node))
        if node.root.kind is Kind.FAMILY and not collapse(node):
            for end in ends:
                fix(end, _WHY)
    for end in _unread(tensors.values(), reads):
        fix(end, _WHY)
    return names


def _unread(tensors: Iterable[Sequence[Node]], reads: Iterable[Read]) -> set[Node]:
    """The free leaves that every op passes on to its results; one that sums over an axis reads it."""
    ends = cache(lambda root: frozenset(leaves(root)))
    waiting = {end for axes in tensors for axis in axes for end in leaves(axis) if end.free_leaf}

    def times(axes: Sequence[Node], end: Node) -> int:
        return sum(end in ends(axis.root) for axis in axes)

    for arguments, results in reads:
        if not waiting:
            break
        for axes in arguments:
            met = waiting & {end for axis in axes for end in ends(axis.root)}
            waiting -= {end for end in met if all(times(axes, end) > times(result, end) for result in results)}
    return waiting
