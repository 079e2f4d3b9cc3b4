"""What a node of an exported graph says of itself: where it is, what it returns, what it writes to."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fedrebasin.errors import TraceError

#: Ops that run a graph of their own in another mode.
WRAPPERS = {"wrap_with_autocast", "wrap_with_set_grad_enabled"}


def module_path(node: torch.fx.Node) -> str:
    """The name of the module that calls the op; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def shapes_of(node: torch.fx.Node, said: str) -> list[tuple[int, ...]]:
    """The shapes of the tensors that an op returns; a TraceError calls it as ``said`` if the data decide on them."""
    value = node.meta.get("val")
    tensors = [item for item in (value if isinstance(value, tuple | list) else [value]) if isinstance(item, Tensor)]
    try:
        return [tuple(int(size) for size in tensor.shape) for tensor in tensors]
    except GuardOnDataDependentSymNode as error:
        raise TraceError(
            f"model: {said} returns a tensor whose size depends on the data; let forward keep sizes (multiply by the "
            "mask, say), or hand over a spec written for this model"
        ) from error


def used_outputs(node: torch.fx.Node) -> set[int]:
    """The outputs of a node that something uses; torch may give the others a wrong shape."""
    parts = [user for user in node.users if user.target is operator.getitem]
    return {cast("int", part.args[1]) for part in parts if part.users} if parts else {0}


def masks_of(node: torch.fx.Node) -> set[int]:
    """Which entries of a list of indices are masks of booleans."""
    listed = next((item for item in node.args if isinstance(item, list | tuple)), ())
    values = [item.meta.get("val") if isinstance(item, torch.fx.Node) else None for item in listed]
    return {
        place
        for place, value in enumerate(values)
        if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
    }


def outs_of(node: torch.fx.Node) -> list[str]:
    """The keywords whose tensors the op only writes its results to."""
    schema = getattr(node.target, "_schema", None)
    return [argument.name for argument in schema.arguments if argument.is_out] if schema else []
