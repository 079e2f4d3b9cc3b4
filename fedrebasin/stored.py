"""A state dict that stays in its safetensors file: tensors are read when they are asked for, and not kept.

The file is read, not mapped, so that what was read and dropped again does not count as the process's memory.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError

#: safetensors' names of dtypes
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
#: how files begin that torch.save wrote (a zip; a bare pickle of protocol 2 to 5), now and long ago
_PICKLED = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its type and shape, and where its bytes lie, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class StoredState(Mapping[str, Tensor]):
    """The tensors of a safetensors file as a state dict that holds none of them.

    Each look-up reads one tensor anew. :func:`fedrebasin.weight_matching` takes such states, and then keeps its
    similarities in files of a temporary folder too, so that it never holds more than a few tensors at once.

    Parameters
    ----------
    path : str or Path
    scratch : str or Path, optional
        Where temporary files of matching go; by default the system's temporary folder.

    Raises
    ------
    RebasinError
        If the file is missing, cut off, a pickle (which could run code when it is loaded), or no safetensors file.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
    >>> save_file({"w": torch.ones(2)}, path)
    >>> StoredState(path)["w"]
    tensor([1., 1.])
    """

    def __init__(self, path: str | Path, *, scratch: str | Path | None = None) -> None:
        self.path, self.scratch = Path(path), scratch
        self.header, self.metadata, self.entries = _read_header(self.path)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if entry.numel:
            with self._open() as file:
                file.seek(entry.start)
                fill(file, tensor.view(-1).view(torch.uint8).numpy(), self.path)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _open(self) -> FileIO:
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise RebasinError(f"{self.path}: cannot read the file any more ({error.strerror})") from error

    @cached_property
    def described(self) -> dict[str, Tensor]:
        """Tensors of the same types and shapes that hold nothing (on the meta device)."""
        return {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in self.entries.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def chunks(self, name: str, size: int = 1 << 23) -> Iterator[Tensor]:
        """A tensor's entries in order, flat, in pieces of ``size`` bytes at most; a piece holds until the next one."""
        entry = self.entries[name]
        buffer = torch.empty(min(size, entry.stop - entry.start), dtype=torch.uint8, device="cpu")
        with self._open() as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.stop, size):
                part = buffer[: min(size, entry.stop - start)]
                fill(file, part.numpy(), self.path)
                yield part.view(entry.dtype)


def described(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What tells types and shapes without reading: a stored state's own description, or the state itself."""
    return state.described if isinstance(state, StoredState) else state


def fill(file: Any, array: Any, path: Path) -> None:
    """Read from an unbuffered file until ``array``, a NumPy array, is full."""
    view = memoryview(array).cast("B")
    while len(view):  # one call reads 2 GiB at most
        count = file.readinto(view)
        if not count:
            raise RebasinError(f"{path}: the file ended before its tensors did; it was changed or cut off")
        view = view[count:]


def _read_header(path: Path) -> tuple[bytes, dict[str, str], dict[str, Entry]]:
    if path.is_dir() or path.name.endswith(".index.json"):
        raise RebasinError(
            f"{path}: expected one safetensors file; got the {'folder' if path.is_dir() else 'index'} of several. Join "
            "its shards: safetensors.torch.save_file({name: tensor for shard in pathlib.Path(folder).glob("
            "'*.safetensors') for name, tensor in safetensors.torch.load_file(shard).items()}, 'joined.safetensors')"
        )
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start, opened = file.read(8), file.read(1) == b"{"  # the length of a header may look like a pickle's start
            if not opened and (start.startswith(_PICKLED) or path.suffix in _PICKLE_SUFFIXES):
                raise RebasinError(f"{path}: expected a safetensors file; got {_other_format(path)}")
            file.seek(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
            text = file.read(length) if length <= min(size, _LONGEST_HEADER) else b""
    except OSError as error:
        raise RebasinError(f"{path}: expected a safetensors file; cannot read it ({error.strerror})") from error
    wrong = f"{path}: expected a safetensors file"
    if not text or len(text) < length:
        raise RebasinError(f"{wrong}; its header is missing or cut off")
    try:
        header = json.loads(text)
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        entries = {name: _entry(one, 8 + length) for name, one in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RebasinError(f"{wrong}; its header cannot be read ({type(error).__name__}: {error})") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end or entry.stop - entry.start != entry.numel * entry.dtype.itemsize:
            raise RebasinError(f"{wrong}; the place of {name!r} in it is wrong")
        end = entry.stop
    if size != end:
        what = "it is cut off" if size < end else "something follows its tensors"
        raise RebasinError(f"{wrong} of {end:,} bytes; got {size:,}: {what}")
    return start + text, metadata, entries


def _other_format(path: Path) -> str:
    """What a zip or a pickle is, and how it becomes a safetensors file."""
    if _is_npz(path):
        return "NumPy's .npz. Convert it: safetensors.numpy.save_file(dict(numpy.load(path)), 'model.safetensors')"
    return (
        "a pickle, which can run code when it is loaded. Convert it where you trust it: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors') if it holds a plain "
        "state dict; of a checkpoint (Lightning's, say) save torch.load(path, weights_only=True)['state_dict'], or "
        "['model']; of a whole model torch.load(path, weights_only=False).state_dict()"
    )


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (OSError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile):  # no zip, or a damaged one
        return False


def _entry(one: Mapping[str, Any], base: int) -> Entry:
    if one["dtype"] not in DTYPES:
        raise ValueError(f"a dtype among {', '.join(DTYPES)} is needed, not {one['dtype']!r}")
    start, stop = one["data_offsets"]
    shape = tuple(int(size) for size in one["shape"])
    if min(shape, default=0) < 0:
        raise ValueError("a size is negative")
    return Entry(DTYPES[one["dtype"]], shape, base + int(start), base + int(stop))
