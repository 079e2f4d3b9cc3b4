"""Other values in the place of an array: the server rewrites replies without holding a second model."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedrebasin.strategies.records import parse_header, plain_header, tensor_to_array


def replace_array(record: ArrayRecord, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the array ``name``, whose shape and dtype it has.

    The record lets go of the old bytes before the new ones are made, which are as long and fit into their place: one
    after the other, the arrays of many replies are rewritten in the memory of one more array. The old ``Array`` is
    not edited, since the sent model may hold it too.

    Examples
    --------
    >>> import torch
    >>> record = ArrayRecord({"weight": Array(np.array([[1.0, 2.0]]))})
    >>> replace_array(record, "weight", torch.tensor([[2.0, 1.0]], dtype=torch.float64))
    >>> record["weight"].numpy()
    array([[2., 1.]])
    """
    old = record[name]
    values, header = tensor.detach().cpu().contiguous().numpy(), plain_header(old)
    # a header of NumPy 1 or of another language may stand there, or Fortran order
    if not header or parse_header(header) != (values.shape, False, values.dtype):
        record[name] = tensor_to_array(tensor)
        return
    record[name] = new = Array(old.dtype, old.shape, old.stype, b"")
    del old
    new.data = b"".join((header, values.reshape(-1).view(np.uint8).data))  # a buffer, since complex types have none
