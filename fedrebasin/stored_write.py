"""Write a safetensors file tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError
from fedrebasin.stored import DTYPES
from fedrebasin.whole_file import whole_file

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_state(
    path: str | Path,
    like: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as they come, so that one of them is held at a time.

    They go to a file beside ``path`` that takes its place when all are there: whatever fails on the way leaves what
    was at ``path`` before, and nothing beside it.

    Parameters
    ----------
    path : str or Path
    like : dict of str to Tensor
        Names, dtypes and shapes in the file's order; only these are read, so that meta tensors do.
    tensors : iterable of (str, Tensor)
        The same names in any order.
    metadata : dict of str to str, optional

    Raises
    ------
    RebasinError
        If tensors are missing, too many, of another shape or dtype, or of one that safetensors lacks; if the file
        cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
    >>> write_state(path, {"w": torch.ones(2)}, [("w", torch.ones(2))])
    >>> load_file(path)
    {'w': tensor([1., 1.])}
    """
    path = Path(path)
    header, starts = _header(like, metadata or {})
    try:
        with whole_file(path) as beside, beside.open("wb", buffering=0) as file:
            file.write(header)
            waiting = set(like)
            for name, tensor in tensors:
                if name not in waiting:
                    raise RebasinError(f"tensors: expected each of the {len(like)} tensors once; got {name!r}")
                if (tensor.dtype, tensor.shape) != (like[name].dtype, like[name].shape):
                    raise RebasinError(
                        f"tensors: expected {name!r} as {like[name].dtype} {tuple(like[name].shape)}; "
                        f"got {tensor.dtype} {tuple(tensor.shape)}"
                    )
                waiting.discard(name)
                file.seek(len(header) + starts[name])
                _write(file.fileno(), tensor)
            if waiting:
                raise RebasinError(f"tensors: expected all of the {len(like)} tensors; {min(waiting)!r} is missing")
            os.fsync(file.fileno())
    except OSError as error:
        raise RebasinError(f"{path}: cannot write the file ({error.strerror})") from error


def _header(like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, start = {}, 0
    # wide types first, as safetensors does, so that each tensor is aligned to its own size; the header keeps the order
    for name in sorted(like, key=lambda name: -like[name].dtype.itemsize):
        starts[name] = start
        start += like[name].numel() * like[name].dtype.itemsize
    for name, tensor in like.items():
        if tensor.dtype not in _NAMES:
            raise RebasinError(f"like: safetensors has no {tensor.dtype}, the type of {name!r}; convert it before")
        stop = starts[name] + tensor.numel() * tensor.dtype.itemsize
        shape = [int(size) for size in tensor.shape]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [starts[name], stop]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts


def _write(file: int, tensor: Tensor) -> None:
    if tensor.numel():
        view = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        while len(view):  # one call writes 2 GiB at most
            view = view[os.write(file, view) :]
