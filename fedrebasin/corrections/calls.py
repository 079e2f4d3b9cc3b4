"""The calls that layers and norms make, and the tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
#: function -> names of its first arguments, which a call may give by position or by name
ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys(CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    **dict.fromkeys(_PRODUCTS, ("input", "weight")),
    torch.addmm: ("bias", "input", "weight"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
NORMS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ARGUMENTS[F.batch_norm],
    F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    F.group_norm: ("input", "num_groups", "weight", "bias"),
    F.rms_norm: ("input", "normalized_shape", "weight"),
}
#: all calls whose output may take an affine map per channel, with their arguments' names
AFFINE: dict[Callable[..., Any], tuple[str, ...]] = {
    **ARGUMENTS,
    **NORMS,
    **dict.fromkeys(TRANSPOSED, ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")),
}

#: ``F.multi_head_attention_forward`` as it would run under no function mode: a mode sees the calls inside, where torch
#: would show it the whole as one call.
attention_inside = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def arguments_of(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by name if ``func`` is one that layers or norms call, otherwise ``None``."""
    names = AFFINE.get(func)
    return None if names is None else {**dict(zip(names, args, strict=False)), **kwargs}


def key_of(func: Any, given: Mapping[str, Any]) -> Any:
    """The tensor by which a call is known: the weight, or a BatchNorm's running mean."""
    mean = given.get("running_mean") if func is F.batch_norm else None
    return given.get("weight") if mean is None else mean


def names_of_tensors(model: nn.Module) -> dict[int, str]:
    """The state dict's key of each parameter and buffer by ``id``."""
    return {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}


def address_of(tensor: Tensor) -> int:
    """Where a tensor's storage lies: the same for all views of it."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without storage (sparse, meta): known by itself alone
        return id(tensor)


def leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)


def examples_in(batch: Any) -> int:
    """How many examples a batch holds: the length of its first tensor.

    >>> examples_in(((torch.zeros(3, 2),), {}))
    3
    """
    return next((len(tensor) for tensor in leaves(batch) if tensor.ndim), 1)
