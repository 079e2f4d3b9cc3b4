"""What the arrays of a record are called in the model: by their keys, or by their places (the legacy API)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedrebasin import PermutationSpec
from fedrebasin.errors import SpecMismatchError
from fedrebasin.strategies.arrays import missing_and_extra
from fedrebasin.strategies.records import DECODE_ERRORS, array_to_tensor

LEGACY = ("fitins.parameters", "fitres.parameters")  # the legacy API's names of the one record of a train message
EMPTY = "_empty"  # a key of the legacy API that stands for no array


def name_of_arrays(content: RecordDict, key: str) -> str | None:
    """The name of the model's record: ``key``, the legacy API's, or that of the only one.

    Examples
    --------
    >>> name_of_arrays(RecordDict({"weights": ArrayRecord()}), "arrays")
    'weights'
    """
    records = content.array_records
    for name in (key, *LEGACY):
        if name in records:
            return name
    return next(iter(records)) if len(records) == 1 else None


def find_arrays(content: RecordDict, key: str) -> ArrayRecord | None:
    """The model's record, by :func:`name_of_arrays`.

    Examples
    --------
    >>> find_arrays(RecordDict({"weights": ArrayRecord()}), "arrays"), find_arrays(RecordDict(), "arrays")
    ({}, None)
    """
    name = name_of_arrays(content, key)
    return None if name is None else content.array_records[name]


def keys_of_tensors(
    spec: PermutationSpec, record: Mapping[str, Array], names: Sequence[str] | None = None
) -> dict[str, str]:
    """For each tensor of the model that the record holds, the key under which it lies there.

    Parameters
    ----------
    spec : PermutationSpec
    record : mapping of str to Array
        With the model's names as keys; or with places, ``"0"``, ``"1"`` and so on, as a list of NumPy arrays gets them.
    names : sequence of str, optional
        What the places are called; by default the whole state dict, or the parameters alone, by the number of arrays.

    Raises
    ------
    SpecMismatchError
        If a key is not in the spec, or places are more or fewer than names.

    Examples
    --------
    >>> import numpy as np
    >>> from flwr.app import ArrayRecord
    >>> spec = PermutationSpec({"weight": (), "mean": ()}, buffers=("mean",))
    >>> record = ArrayRecord([np.ones(())])
    >>> keys_of_tensors(spec, record)
    {'weight': '0'}
    """
    keys = [key for key in record if key != EMPTY]
    if all(key in spec.axes for key in keys):
        return {key: key for key in keys}
    if keys != [str(place) for place in range(len(keys))]:
        raise SpecMismatchError(
            f"arrays: got {missing_and_extra(keys, list(spec.axes))}; use the spec of this model, and send "
            "ArrayRecord(model.state_dict()) or a part of it"
        )
    known = [names] if names is not None else [tuple(spec.axes), spec.parameters]
    found = next((some for some in known if len(some) == len(keys)), None)
    if found is None:
        expected = " or ".join(str(len(some)) for some in known)
        raise SpecMismatchError(
            f"arrays: expected {expected}, one for each tensor of the spec; got a list of {len(keys)} arrays without "
            "names; give names=, their names in the order in which they are sent"
        )
    return dict(zip(found, keys, strict=True))


def decode(record: Mapping[str, Array], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Decode the tensors of ``keys``, under their names in the model.

    Raises
    ------
    SpecMismatchError
        If one is missing, or is not a NumPy array.
    """
    state: dict[str, Tensor] = {}
    for name, key in keys.items():
        if key not in record:
            raise SpecMismatchError(f"arrays: expected {name!r} under the key {key!r}; it is missing")
        try:
            state[name] = array_to_tensor(record[key])
        except DECODE_ERRORS as error:
            raise SpecMismatchError(f"arrays: {name!r} cannot be decoded ({type(error).__name__}: {error})") from error
    return state
