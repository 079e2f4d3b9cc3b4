"""What can be wrong with the arrays of a reply: keys, shapes, dtypes, values.

The bound on size: a reply is *huge* if the root mean square of one of its trained tensors is over ``FACTOR``
times the largest of: that tensor's in the sent model, the sent model's over all its tensors, the lower median of
that tensor's over the replies (of two or more), and ``FLOOR``; or if one of its values overflows float32 when
squared. The median is the lower one so that of two replies the huge one is not its own yardstick.

A variance of 1e10 is right for raw inputs, so that running statistics are held to the second rule, and to each other
where there are three replies or more: ``running_var`` may be ``FACTOR`` times the largest of the sent model's, the
upper median of the replies' and ``FLOOR``; the square of ``running_mean`` as often that, its own or the variance's. One
client of four at 100 times the others' variance costs 3 to 5 points, at 1000 times 16 to 24 (MLP with a BatchNorm,
one round), whatever it learnt; the upper median is half or more of the replies', so that a minority alone is left out.
A negative variance is none, unless the sent model has one.

Inside differential privacy no reply may decide what becomes of another: the bounds come from the sent model and the
constants alone, and running statistics, which reach nothing there, have none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from flwr.app import Array

from fedrebasin.prefixes import common_prefix, wrappers_of
from fedrebasin.strategies.records import DECODE_ERRORS, array_view, sum_of_squares

FACTOR = 1e3
FLOOR = 1e-2
_FINITE = float(np.finfo(np.float32).max)
LARGEST = math.sqrt(_FINITE)
_STATISTICS = ("running_mean", "running_var")
Measured = float  # the root mean square of one tensor


class _Values(NamedTuple):
    rms: float
    largest: float  # at least the largest size of a value, if that is over LARGEST


def _measure(values: np.ndarray) -> _Values:
    """NaN or infinite if any value is."""
    if values.size == 0 or values.dtype.kind not in "fc":
        return _Values(0.0, 0.0)
    total = sum_of_squares(values)
    if total < _FINITE:  # then no value is over LARGEST
        return _Values(math.sqrt(total / values.size), 0.0)
    sizes = np.abs(values)
    largest = float(np.max(sizes))
    scaled = sizes / largest if 0 < largest < math.inf else sizes  # no overflow on the way to the sum
    return _Values(largest * float(np.sqrt(np.mean(np.square(scaled, dtype=np.float64)))), largest)


def measure_arrays(arrays: Mapping[str, Array], sent: Mapping[str, Array]) -> dict[str, Measured] | str:
    """Return the root mean square of every tensor, or say which is wrong and how.

    Examples
    --------
    >>> from flwr.app import ArrayRecord
    >>> sent = ArrayRecord({"a": Array(np.ones((2, 3), np.float32))})
    >>> measure_arrays(sent, sent)
    {'a': 1.0}
    >>> measure_arrays(ArrayRecord({"a": Array(np.ones((3, 2), np.float32))}), sent)
    "'a' as (3, 2), the sent model has (2, 3)"
    """
    found: dict[str, Measured] = {}
    for name, expected in sent.items():
        try:
            values = array_view(arrays[name])
        except DECODE_ERRORS as error:
            return f"{name!r} in a form that cannot be decoded ({type(error).__name__}: {error})"
        if not isinstance(values, np.ndarray) or tuple(values.shape) != tuple(expected.shape):
            return f"{name!r} as {tuple(arrays[name].shape)}, the sent model has {tuple(expected.shape)}"
        if values.dtype != expected.dtype:
            return f"{name!r} with dtype {values.dtype}, the sent model has {expected.dtype}"
        rms, largest = _measure(values)
        if (not math.isfinite(rms) or largest > LARGEST) and np.array_equal(
            values, array_view(expected), equal_nan=True
        ):
            rms = largest = 0.0  # a constant, an attention's mask say
        if not math.isfinite(rms):
            return f"{name!r} with a NaN or an infinity"
        if largest > LARGEST:
            return f"{name!r} with the value {largest:.3g}, whose square overflows float32"
        if name.endswith("running_var") and (values < 0).any() and not (array_view(expected) < 0).any():
            return f"{name!r} with the value {values.min():.3g}, a negative variance"
        found[name] = rms
    return found


def find_huge(
    measured: Mapping[int, Mapping[str, Measured]],
    sent: Mapping[str, Array],
    parameters: Collection[str],
    *,
    alone: bool = False,
) -> dict[int, str]:
    """Say which replies are beyond the bound on size, and in which tensor.

    ``alone``: no reply is held to the others', as differential privacy needs it.
    """
    if not measured:
        return {}
    names = [name for name in sent if name in parameters]
    own = {name: _measure(array_view(sent[name])).rms for name in names}
    sizes = {name: math.prod(sent[name].shape) for name in names}
    total = sum(sizes.values())
    overall = math.sqrt(sum(sizes[name] * own[name] ** 2 for name in names) / total) if total else 0.0
    bounds: dict[str, tuple[float, float]] = {}
    for name in names:
        values = sorted(found[name] for found in measured.values())
        median = values[(len(values) - 1) // 2] if len(values) > 1 and not alone else 0.0
        scales = [scale for scale in (own[name], overall, median, FLOOR) if math.isfinite(scale)]
        bounds[name] = FACTOR, max(scales)
    bounds |= {} if alone else _bounds_of_statistics(measured, sent, parameters)
    huge: dict[int, str] = {}
    for name, (factor, scale) in bounds.items():
        for place, found in measured.items():
            if place not in huge and found[name] > factor * scale:
                huge[place] = (
                    f"{name!r} with root mean square {found[name]:.3g}, over {factor:.4g} times what the sent model "
                    f"and the other replies have ({scale:.3g})"
                    + ("" if name in parameters else ": its inputs are not scaled as theirs")
                )
    return huge


def _bounds_of_statistics(
    measured: Mapping[int, Mapping[str, Measured]], sent: Mapping[str, Array], parameters: Collection[str]
) -> dict[str, tuple[float, float]]:
    """For each running statistic, the scale that is usual and how many times that it may be."""
    names = [name for name in sent if name.endswith(_STATISTICS) and name not in parameters]
    if len(measured) < 3:
        return {}
    usual: dict[str, float] = {}  # as a variance
    for name in names:
        values = sorted(found[name] for found in measured.values())
        scale = max(_measure(array_view(sent[name])).rms, values[len(values) // 2])
        usual[name] = scale if name.endswith("var") else scale * scale  # inf where ** raises
    bounds: dict[str, tuple[float, float]] = {}
    for name in names:
        if name.endswith("var"):
            bounds[name] = FACTOR, max(usual[name], FLOOR)
        else:
            variance = usual.get(name.removesuffix("mean") + "var", 0.0)
            bounds[name] = math.sqrt(FACTOR), math.sqrt(max(usual[name], variance, FLOOR))
    return bounds


def is_unchanged(arrays: Mapping[str, Array], sent: Mapping[str, Array], parameters: Collection[str]) -> bool:
    """Whether all trained tensors are those that were sent."""
    names = [name for name in sent if name in parameters]
    return all(np.array_equal(array_view(arrays[name]), array_view(sent[name])) for name in names)


def missing_and_extra(arrays: Collection[str], sent: Collection[str]) -> str:
    """Name the first tensor that is missing or not known.

    Examples
    --------
    >>> missing_and_extra(["a"], ["a", "b"])
    "1 of 2 tensors, without 'b'"
    """
    missing = [name for name in sent if name not in arrays]
    extra = [name for name in arrays if name not in sent]
    if missing and not extra:
        return f"{len(arrays)} of {len(sent)} tensors, without {missing[0]!r}"
    if extra and not missing:
        return f"a tensor {extra[0]!r} that the sent model lacks"
    return f"a tensor {extra[0]!r} that the sent model lacks, and no {missing[0]!r}"


def explain_keys(arrays: Collection[str], sent: Collection[str]) -> str:
    """Say why all clients may send the same other keys, and what to do.

    Examples
    --------
    >>> explain_keys(["module.a", "module.b"], ["a", "b"])
    "their keys have the prefix 'module.' (DataParallel): send ArrayRecord(model.module.state_dict())"
    """
    for here, there, whose in ((arrays, sent, "their keys have"), (sent, arrays, "the sent model's keys have")):
        prefix = common_prefix(here, there)
        if prefix:
            remedy = "send the state dict of the model that the server sends"
            if wrappers_of(prefix):
                remedy = f"send ArrayRecord(model.{prefix}state_dict())"
            if here is sent:
                remedy = "pass initial_arrays made from the same model as the clients', without its wrapper"
            return f"{whose} the prefix {prefix!r}{wrappers_of(prefix)}: {remedy}"
    if set(arrays) == {str(place) for place in range(len(arrays))}:
        return (
            "their keys are '0', '1', ..., as of a list of NumPy arrays, which has lost the names: "
            "send ArrayRecord(model.state_dict())"
        )
    if set(arrays) < set(sent):
        return (
            f"they hold {missing_and_extra(arrays, sent)}: send the whole ArrayRecord(model.state_dict()), "
            "frozen parameters and running statistics too, or make initial_arrays of this part as well"
        )
    return f"they hold {missing_and_extra(arrays, sent)}: send the state dict of the model that the server sends"
