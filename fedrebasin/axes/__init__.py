"""The axes of a traced network: trees that are refined and tied while the graph is walked."""

from fedrebasin.axes.node import Node, concat, depend, family, fix, is_fixed, leaf, leaves, narrowed, product, reason_of
from fedrebasin.axes.refine import cut, split
from fedrebasin.axes.unify import collapse, unify

__all__ = [
    "Node",
    "collapse",
    "concat",
    "cut",
    "depend",
    "family",
    "fix",
    "is_fixed",
    "leaf",
    "leaves",
    "narrowed",
    "product",
    "reason_of",
    "split",
    "unify",
]
