"""Tensors whose entries are all equal, a state of zeros above all: any permutation keeps them, so they tie nothing."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from fedrebasin.rules.lookups import repeat
from fedrebasin.rules.parts import narrow_rule, select, slice_, split, unbind
from fedrebasin.rules.pointwise import one_input
from fedrebasin.rules.registry import Value
from fedrebasin.rules.shapes import expand, permute, regroup, transpose

#: Rules of ops whose results have the entries of the first argument, and no others.
_SAME_ENTRIES = {
    expand,
    narrow_rule,
    one_input,
    permute,
    regroup,
    repeat,
    select,
    slice_,
    split,
    transpose,
    unbind,
}


def stays_uniform(node: torch.fx.Node, rule: object, values: Mapping[torch.fx.Node, Any]) -> bool:
    """Whether the op only copies, shapes or cuts a tensor whose entries are all equal."""
    source = values.get(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else None
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())  # dropout
    return isinstance(source, Value) and source.uniform and rule in _SAME_ENTRIES and not drawn


def may_be_written(node: torch.fx.Node) -> bool:
    """Whether some use of the node's tensor, or of a view of it, may write into it."""
    for user in node.users:
        aliases = [argument.alias_info for argument in getattr(getattr(user.target, "_schema", None), "arguments", ())]
        view = user.target is operator.getitem or any(alias is not None for alias in aliases)
        if not (view or aliases) or any(alias is not None and alias.is_write for alias in aliases):
            return True
        if view and may_be_written(user):
            return True
    return False
