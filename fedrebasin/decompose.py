"""An op without a rule as a graph of simpler ones, by torch's own decompositions."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from fedrebasin.rules.registry import op_name


@cache
def _table() -> Any:
    return core_aten_decompositions()


def decompose(node: torch.fx.Node) -> torch.fx.Graph | None:
    """The graph of an op, its placeholders the op's tensors in order; ``None`` where torch has no simpler form."""
    arguments = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), Tensor)]
    order: list[torch.fx.Node] = []

    def note(item: torch.fx.Node) -> torch.fx.Node:
        order.append(item)
        return item

    torch.fx.node.map_arg((node.args, node.kwargs), note)
    if not callable(node.target) or len(arguments) != len(set(order)):
        return None
    target = node.target

    def call(*tensors: Tensor) -> Any:
        queue = iter(tensors)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda _: next(queue))
        return target(*args, **kwargs)

    fakes = [item.meta["val"] for item in order]
    mode = next((fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")), None)
    if mode is None:
        return None
    try:
        with mode, torch.no_grad():
            graph = make_fx(call, decomposition_table=_table(), tracing_mode="real")(*fakes).graph
    except Exception:  # noqa: BLE001 - decompositions fail in ways of their own; the op is then fixed by name
        return None
    return (
        None if any(op_name(inner) == op_name(node) for inner in graph.nodes if inner.op == "call_function") else graph
    )
