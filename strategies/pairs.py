"""Complex parameters as pairs of real numbers, which is how the inner strategy sees them.

Flower's strategies are written for real numbers: their privacy noise is real, and would leave imaginary parts bare; a
server optimizer divides by the root of a complex square, which has lost the direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

Values = np.ndarray[Any, Any]


def pairs_of(values: Values) -> Values:
    """Real and imaginary parts along a further last axis; real arrays are handed on as they are.

    Examples
    --------
    >>> pairs_of(np.array([1 + 2j])).tolist(), pairs_of(np.array([1.0])).tolist()
    ([[1.0, 2.0]], [1.0])
    """
    return np.stack([values.real, values.imag], -1) if values.dtype.kind == "c" else values


def to_pairs(record: ArrayRecord) -> ArrayRecord:
    """Replace the complex arrays of a record, in place; return it.

    Examples
    --------
    >>> to_pairs(ArrayRecord({"weight": Array(np.ones(3, np.complex64))}))["weight"].shape
    (3, 2)
    """
    for name, array in record.items():
        if array.dtype.startswith("complex"):
            record[name] = Array(pairs_of(array.numpy()))
    return record


def from_pairs(record: Mapping[str, Array], like: Mapping[str, Array]) -> ArrayRecord:
    """The record in the order of ``like``, with complex arrays where that has them; keys that it lacks are left out.

    What is no pairs of that shape is handed on as it is.

    Examples
    --------
    >>> like = ArrayRecord({"weight": Array(np.array([1 + 2j]))})
    >>> from_pairs(to_pairs(ArrayRecord(dict(like))), like)["weight"].numpy()
    array([1.+2.j])
    """
    found = ArrayRecord()
    for name, target in like.items():
        if name in record:
            array = record[name]
            pairs = target.dtype.startswith("complex") and not array.dtype.startswith("complex")
            if pairs and tuple(array.shape) == (*target.shape, 2):
                values = np.ascontiguousarray(array.numpy())
                array = Array(np.array(values.view(f"c{2 * values.itemsize}")[..., 0], order="C"))
            found[name] = array
    return found
