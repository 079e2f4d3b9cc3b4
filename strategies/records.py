"""ArrayRecord <-> state dict: key order, dtypes and 0-d shapes kept."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedrebasin.errors import SpecMismatchError

# what Array.numpy() raises on a serialisation that is not a NumPy array, cut off, or larger than memory
DECODE_ERRORS = (TypeError, ValueError, EOFError, OSError, KeyError, MemoryError, SyntaxError, zipfile.BadZipFile)


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
    return torch.from_numpy(np.array(array.numpy(), order="C"))


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


def is_finite(record: Mapping[str, Array]) -> bool:
    """Tell whether all entries of all arrays are finite.

    Examples
    --------
    >>> is_finite({"a": Array(np.ones(2))}), is_finite({"a": Array(np.array(np.nan))})
    (True, False)
    """
    return all(bool(np.isfinite(array.numpy()).all()) for array in record.values())
