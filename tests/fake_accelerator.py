"""A device that torch takes for an accelerator: it computes on the CPU, and refuses CPU tensors beside its own.

To register it changes the process for good, so that this is done in a process of its own (``accelerator_run.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fake"
#: They take a tensor from one device to another.
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
_INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class Fake(Tensor):
    """A tensor on the device; ``raw`` holds its data, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Fake:
        made = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
            dispatch_sizes_strides_policy=None,
        )
        made.raw = raw
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Fake({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Fake) else value


def _refuse_mixed(name: str, args: Any, kwargs: Any) -> None:
    """As CUDA does; an index may be on the CPU, and so may a number."""
    if name in _COPIES:
        return
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name in _INDEXING and isinstance(args[0], Fake):
        leaves = [args[0], *args[2:3]] if name != "aten::index" else [args[0]]
    ours = any(isinstance(leaf, Fake) for leaf in leaves)
    others = any(leaf.device.type == "cpu" and leaf.ndim for leaf in leaves if not isinstance(leaf, Fake))
    if ours and others:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two in {name}")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name
    _refuse_mixed(name, args, kwargs)
    here = any(isinstance(leaf, Fake) for leaf in tree_leaves((args, kwargs)))
    plain = {key: _raw(value) for key, value in kwargs.items() if key != "pin_memory"}
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        if device.type == "meta":
            return func(*tree_map(lambda leaf: leaf.raw.to("meta") if isinstance(leaf, Fake) else leaf, args), **plain)
        here = device.type == NAME
        plain["device"] = torch.device("cpu") if here else device
    out = func(*tree_map(_raw, args), **tree_map(_raw, plain))
    written = [at for at, arg in enumerate(func._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
    if len(func._schema.returns) == 1 and func._schema.returns[0].alias_info and written:  # in place
        return args[written[0]] if written[0] < len(args) else kwargs[func._schema.arguments[written[0]].name]
    return tree_map(lambda leaf: Fake(leaf) if isinstance(leaf, Tensor) and here else leaf, out)


def _empty(size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return Fake(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return Fake(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    del non_blocking
    _raw(target).copy_(_raw(source))
    return target


def register() -> torch.library.Library:
    """Make the device; it lasts as long as what is returned is held."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_copy_from_and_resize", _copy_from, "PrivateUse1")
    return library
