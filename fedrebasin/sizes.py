"""Sizes inside a graph that depend on the data: the example inputs' own, found by running the graph once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node


def settle_sizes(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give every node of a graph with sizes that depend on the data the sizes, and numbers, of these inputs.

    Shapes of other graphs are known, and nothing is run.
    """
    if not any(_is_open(node.meta.get("val")) for node in program.graph.nodes):
        return
    leaves = iter(torch.utils._pytree.tree_leaves((args, kwargs)))
    held = {**program.constants, **program.state_dict}
    inputs = []
    for spec in program.graph_signature.input_specs:
        value = next(leaves) if spec.kind is InputKind.USER_INPUT else held[str(spec.target)]
        inputs.append(value.clone() if spec.kind is InputKind.BUFFER else value)  # into which a graph may write
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _Run(program.graph_module).run(*inputs)


class _Run(Interpreter):
    """Leaves in every node tensors without data, of the shapes that came out, and numbers as they are."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self._mode = FakeTensorMode()

    def run_node(self, n: Node) -> Any:
        """As torch runs it, but for assertions on sizes."""
        result = None if n.target is torch.ops.aten._assert_scalar.default else super().run_node(n)
        if n.op != "output":
            n.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, self._mode.from_tensor, result)
        return result


def _is_open(value: Any) -> bool:
    sizes = [size for part in torch.utils._pytree.tree_leaves(value) for size in getattr(part, "shape", (part,))]
    return any(isinstance(size, torch.SymInt) for size in sizes)
