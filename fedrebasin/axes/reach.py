"""Parts of parameters that no op reads: no graph shows what they go with (positions beyond the inputs' length)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from fedrebasin.axes.node import Node, fix, leaves

#: The axes of each argument of an op, and those of each result.
Read = tuple[list[list[Node]], list[list[Node]]]


def fix_unread(tensors: Mapping[str, Sequence[Node]], reads: Iterable[Read]) -> list[str]:
    """Fix what the example inputs do not reach; the names of the tensors that it is in."""
    rest = _unread(tensors.values(), reads)
    names = [name for name, axes in tensors.items() if any(end in rest for axis in axes for end in leaves(axis))]
    for end in rest:
        fix(end, "not reached by the example inputs")
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
