"""ArrayRecord <-> state dict: key order, dtypes and 0-d shapes kept."""

from __future__ import annotations

import math
import tokenize
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedrebasin.errors import SpecMismatchError

with warnings.catch_warnings():  # torch warns once of memory that cannot be written; here nothing writes it
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))

# what Array.numpy() raises on a serialisation that is not a NumPy array, cut off, or larger than memory: NumPy reads
# a header with Python's own parser, which has several words for one that is damaged
DECODE_ERRORS = (
    *(TypeError, ValueError, EOFError, OSError, KeyError, MemoryError, ArithmeticError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile),
)


def array_to_tensor(array: Array) -> Tensor:
    """Decode one array; the tensor owns its memory.

    Raises
    ------
    TypeError
        If torch has no such dtype (strings, big-endian numbers).

    Examples
    --------
    >>> array_to_tensor(Array(np.array(3)))
    tensor(3)
    """
    # not np.ascontiguousarray: it turns a 0-d array into one of shape (1,)
    return torch.from_numpy(np.array(array_view(array), order="C"))


def array_view(array: Array) -> np.ndarray[Any, Any]:
    """Decode one array without a copy: it lies in the record's own bytes and cannot be written.

    What is not a NumPy array of plain numbers is left to :meth:`Array.numpy`, which copies, or raises one of
    ``DECODE_ERRORS``.

    Examples
    --------
    >>> view = array_view(Array(np.ones((2, 3), np.float16)))
    >>> view.shape, view.dtype, view.flags.writeable
    ((2, 3), dtype('float16'), False)
    """
    header = plain_header(array)
    if header:
        try:
            shape, fortran, dtype = parse_header(header)
            if not dtype.hasobject:
                flat = np.frombuffer(array.data, dtype, count=math.prod(shape), offset=len(header))
                return flat.reshape(shape, order="F" if fortran else "C")
        except DECODE_ERRORS:
            pass  # numpy() says what is wrong
    return array.numpy()


def plain_header(array: Array) -> bytes:
    """What stands before the values in NumPy's form, version 1; empty if the array is in another."""
    header = array.data[: 10 + int.from_bytes(array.data[8:10], "little")]
    return header if array.stype == "numpy.ndarray" and header[:8] == b"\x93NUMPY\x01\x00" else b""


@lru_cache(maxsize=4096)
def parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype; the same few headers come with every reply, and parsing takes 0.1 ms."""
    stream = BytesIO(header)
    np.lib.format.read_magic(stream)
    return np.lib.format.read_array_header_1_0(stream)


def tensor_view(array: Array) -> Tensor:
    """Decode one array without a copy where its bytes allow; for reading only.

    Raises
    ------
    TypeError
        If torch has no such dtype.

    Examples
    --------
    >>> tensor_view(Array(np.array([1, 2])))
    tensor([1, 2])
    """
    values = array_view(array)
    if not (values.flags.c_contiguous and values.flags.aligned):
        values = np.array(values, order="C")
    return torch.from_numpy(values)


class RecordView(Mapping[str, Tensor]):
    """A record as a state dict for reading: a tensor is decoded when it is asked for, without a copy, and not kept.

    Examples
    --------
    >>> RecordView(ArrayRecord({"weight": Array(np.ones((1, 2), np.float32))}))["weight"]
    tensor([[1., 1.]])
    """

    def __init__(self, record: Mapping[str, Array]) -> None:
        self._record = record

    def __getitem__(self, name: str) -> Tensor:
        return tensor_view(self._record[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._record)

    def __len__(self) -> int:
        return len(self._record)


def tensor_to_array(tensor: Tensor) -> Array:
    """Encode one tensor.

    Raises
    ------
    SpecMismatchError
        If NumPy, and so Flower's wire, has no such dtype (bfloat16, float8).

    Examples
    --------
    >>> tensor_to_array(torch.zeros((), dtype=torch.int64)).shape
    ()
    """
    try:
        values = tensor.detach().cpu().numpy()
    except TypeError as error:
        raise SpecMismatchError(
            f"a tensor has dtype {tensor.dtype}, which Flower's wire does not carry; send it as float32"
        ) from error
    return Array(np.array(values, order="C"))


def record_to_state(record: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Decode the arrays called ``names`` (default: all, in the record's order).

    Examples
    --------
    >>> record_to_state(ArrayRecord({"weight": Array(np.ones((1, 2), np.float16))}))
    {'weight': tensor([[1., 1.]], dtype=torch.float16)}
    """
    return {name: array_to_tensor(record[name]) for name in (record if names is None else names)}


def state_to_record(state: dict[str, Tensor]) -> ArrayRecord:
    """Encode a state dict, in its order.

    Examples
    --------
    >>> list(state_to_record({"b": torch.zeros(1), "a": torch.zeros(2)}))
    ['b', 'a']
    """
    record = ArrayRecord()
    for name, tensor in state.items():
        record[name] = tensor_to_array(tensor)
    return record


def select_arrays(record: Mapping[str, Array], names: Sequence[str]) -> ArrayRecord:
    """Make a record of the arrays called ``names``, in this order; no array is copied.

    Examples
    --------
    >>> list(select_arrays(state_to_record({"b": torch.zeros(1), "a": torch.zeros(2)}), ["a"]))
    ['a']
    """
    selected = ArrayRecord()
    for name in names:
        selected[name] = record[name]
    return selected


def cast_arrays(record: Mapping[str, Array], like: Mapping[str, Array]) -> ArrayRecord:
    """Return the record with the dtypes of ``like``, in the order of ``like``; keys that it lacks are left out.

    Server optimizers return float64 throughout (NumPy promotes float32 times a float64 scalar). Arrays
    that have the dtype already are handed on as they are, bit for bit.

    Examples
    --------
    >>> wide, narrow = ArrayRecord({"a": Array(np.ones(2))}), ArrayRecord({"a": Array(np.ones(2, np.float32))})
    >>> cast_arrays(wide, narrow)["a"].dtype
    'float32'
    """
    cast = ArrayRecord()
    for name, target in like.items():
        if name in record:
            array = record[name]
            if array.dtype != target.dtype:
                array = Array(np.array(array.numpy(), dtype=np.dtype(target.dtype), order="C"))
            cast[name] = array
    return cast


def is_finite(record: Mapping[str, Array], sent: Mapping[str, Array]) -> bool:
    """Tell whether all entries are finite, but in arrays that are as they were sent: an attention's mask may be.

    Examples
    --------
    >>> bad = {"a": Array(np.array(np.nan))}
    >>> is_finite({"a": Array(np.ones(2))}, bad), is_finite(bad, {"a": Array(np.ones(2))}), is_finite(bad, bad)
    (True, False, True)
    """
    return all(
        _is_finite(array_view(array)) or np.array_equal(array_view(array), array_view(sent[name]), equal_nan=True)
        for name, array in record.items()
    )


def _is_finite(values: np.ndarray[Any, Any]) -> bool:
    total = sum_of_squares(values)
    return True if total < np.inf else bool(np.isfinite(values).all())


def sum_of_squares(values: np.ndarray[Any, Any]) -> float:
    """In one pass; not finite if an entry is not, or if the sum overflows the array's own type.

    Examples
    --------
    >>> sum_of_squares(np.array([[3.0, 4.0]])), sum_of_squares(np.array([1.0, np.nan]))
    (25.0, nan)
    """
    if values.dtype.kind != "f":
        values = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
    elif values.dtype.itemsize < 4:
        values = values.astype(np.float32)
    flat = values.reshape(-1, order="A")
    return float(np.vdot(flat, flat).real)  # of vectors: BLAS, which warns of nothing
