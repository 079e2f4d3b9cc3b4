"""What rules are made of: values, ties, and the registry that ``rule`` adds to.

A rule gets the arguments of the op, each tensor as a :class:`Value`, and returns the Value of its output.
Rules tie axes with ``traced.tie``; a shape that a rule does not cover raises ``NotCoveredError``, and the
tracer then fixes every axis that the op touches, which is always correct.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch

from fedrebasin import axes
from fedrebasin.axes import Node


class NotCoveredError(Exception):
    """The rule does not cover these arguments."""


@dataclass
class Value:
    """A tensor of the graph: its axes, its ``name`` in the state dict if it has one, whether all entries are equal."""

    axes: list[Node]
    name: str = ""
    uniform: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(axis.size for axis in self.axes)


@dataclass
class Traced:
    """What the rules share: tied axes, seen tensors, running statistics; of the op at hand the shapes that it returns,
    which entries of a list of indices are masks of booleans, whether it leaves units out, and whether it sums over axes
    that its results have, too."""

    tensors: list[list[Node]] = field(default_factory=list)
    statistics: set[str] = field(default_factory=set)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)
    masks: set[int] = field(default_factory=set)
    in_part: bool = False
    sums: bool = False
    unlike: list[tuple[Node, Node]] = field(default_factory=list)

    def tie(self, *nodes: Node) -> Node:
        """One permutation moves all these axes."""
        for other in nodes[1:]:
            if not axes.unify(nodes[0], other):
                self.unlike.append((nodes[0], other))
        return nodes[0]

    def split(self, node: Node, sizes: Sequence[int]) -> list[Node]:
        """View an axis as a product of factors of these sizes; if its units do not fit them, fix it."""
        return axes.split(node, sizes) or self._fixed_parts(node, sizes)

    def cut(self, node: Node, sizes: Sequence[int]) -> list[Node]:
        """View an axis as parts of these sizes side by side; if its units do not fit them, fix it."""
        return axes.cut(node, sizes) or self._fixed_parts(node, sizes)

    def _fixed_parts(self, node: Node, sizes: Sequence[int]) -> list[Node]:
        axes.fix(node, "cut across units")
        return [axes.leaf(size, "cut across units") for size in sizes]

    def fix(self, value: Value, reason: str) -> None:
        """No permutation may move any axis of the value."""
        for axis in value.axes:
            axes.fix(axis, reason)

    def within(self, nodes: Iterable[Node]) -> None:
        """Note a tensor inside the op, e.g. a sum over an axis: a family needs its outer axis there, too."""
        self.tensors.append(list(nodes))


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
_R = TypeVar("_R", bound=Rule)


def rule(*names: str) -> Callable[[_R], _R]:
    """Register a rule for ATen ops, named without namespace, overload and the ``_`` of in-place variants."""

    def register(function: _R) -> _R:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(node: torch.fx.Node) -> str:
    """``aten.relu_.default`` is ``relu``; ops of other libraries, and plain functions, keep their namespace."""
    if isinstance(node.target, FunctionType | BuiltinFunctionType):
        return f"{node.target.__module__}.{node.target.__name__}"
    name = re.sub(r"\.[A-Za-z0-9_]+$", "", str(node.target)) if "." in str(node.target) else str(node.target)
    base = name.removeprefix("aten.")
    return base.rstrip("_") if name.startswith("aten.") and not base.startswith("__") else name
