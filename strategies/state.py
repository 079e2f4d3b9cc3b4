"""What strategies and random generators remember between rounds, as flat arrays and JSON, and back.

Of each strategy in the chain (``Rebasin``'s inner one, the one that it wraps, ...) are kept: the attributes that hold
arrays, tensors or an object with a ``state_dict`` (FedAdam's moments, FedAvgM's momentum, a privacy accountant), and
the numbers, texts and lists of them that are no longer what they were when the run began (an adaptive clipping norm);
so is what a class derived from Rebasin adds. Settings do not change, so that a resumed run takes them from the user's
code. What may have changed and cannot be kept is named in the log.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import isroutine
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedrebasin.strategies.inner import chain
from fedrebasin.strategies.network import find_device

Arrays = dict[str, np.ndarray]
Facts = Any  # what JSON holds
_PLAIN = (bool, int, float, str, type(None))
_RECORDS: dict[str, Any] = {"metrics": MetricRecord, "config": ConfigRecord, "records": RecordDict}
_BITS = {name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")}


def encode(value: object, name: str, arrays: Arrays) -> Facts:
    """Describe a value as JSON; its arrays go into ``arrays`` under names that begin with ``name``.

    Raises
    ------
    TypeError
        If it is neither a number, text, None, array, tensor, record of Flower's, NumPy generator, object with
        ``state_dict`` and ``load_state_dict``, nor a list, tuple or dict of such.

    Examples
    --------
    >>> arrays = {}
    >>> encode({"a": np.ones(2), "b": [1.5, None]}, "m", arrays)
    {'dict': {'a': {'array': 'm/a'}, 'b': {'list': [{'value': 1.5}, {'value': None}]}}}
    >>> decode(_, arrays)
    {'a': array([1., 1.]), 'b': [1.5, None]}
    """
    if isinstance(value, _PLAIN):
        return {"value": value}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        arrays[name] = np.asarray(value)
        return {"array": name}
    if isinstance(value, Tensor):
        return {"tensor": [encode(_values(value), name, arrays), str(value.device)]}
    if isinstance(value, ArrayRecord):
        return {"record": {key: encode(item.numpy(), f"{name}/{key}", arrays) for key, item in value.items()}}
    for kind, record in _RECORDS.items():
        if isinstance(value, record):
            return {kind: encode(dict(value), name, arrays)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item, f"{name}/{key}", arrays) for key, item in value.items()}}
    if isinstance(value, Mapping) and all(isinstance(key, _PLAIN) for key in value):
        pairs = enumerate(value.items())
        return {"pairs": [[key, encode(item, f"{name}/{place}", arrays)] for place, (key, item) in pairs]}
    if isinstance(value, np.random.Generator) and type(value.bit_generator).__name__ in _BITS:
        return {"generator": encode(value.bit_generator.state, name, arrays)}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(item, f"{name}/{place}", arrays) for place, item in enumerate(value)]}
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return {"state": encode(value.state_dict(), name, arrays)}  # type: ignore[attr-defined]
    raise TypeError(f"{type(value).__name__} is no number, text, array or collection of them")


def _values(tensor: Tensor) -> np.ndarray:
    try:
        return tensor.detach().cpu().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"NumPy has no {tensor.layout} tensors of {tensor.dtype} on {tensor.device}") from error


def decode(facts: Facts, arrays: Mapping[str, np.ndarray]) -> Any:
    """Undo :func:`encode`; an object with a state comes back as the state.

    Raises
    ------
    ValueError, KeyError, TypeError, AttributeError
        If it is not what ``encode`` writes.
    """
    ((kind, inner),) = facts.items()
    if kind == "value" and isinstance(inner, _PLAIN):
        return inner
    if kind == "array":
        return arrays[inner]
    if kind == "tensor":
        values, device = inner
        return torch.from_numpy(np.array(decode(values, arrays))).to(find_device(device))
    if kind == "record":
        return ArrayRecord({key: Array(decode(item, arrays)) for key, item in inner.items()})
    if kind in _RECORDS:
        return _RECORDS[kind](decode(inner, arrays))
    if kind == "dict":
        return {key: decode(item, arrays) for key, item in inner.items()}
    if kind == "pairs":
        return {key: decode(item, arrays) for key, item in inner}
    if kind == "generator":
        state = decode(inner, arrays)
        bits = _BITS[state["bit_generator"]]()
        bits.state = state
        return np.random.Generator(bits)
    if kind in ("list", "tuple"):
        items = [decode(item, arrays) for item in inner]
        return items if kind == "list" else tuple(items)
    if kind == "state":
        return decode(inner, arrays)
    raise ValueError(f"{kind!r} is no kind of value")


def links_with_state(strategy: Strategy) -> list[Strategy]:
    """The strategies whose attributes are kept: those inside, and the outermost where its class adds some."""
    outer, *inside = chain(strategy)
    return [*([outer] if _attributes(outer) else []), *inside]


def _attributes(link: Strategy) -> dict[str, Any]:
    """Without those of Rebasin's own, which it makes or keeps itself."""
    built_in: frozenset[str] = getattr(link, "built_in", frozenset())
    return {key: value for key, value in vars(link).items() if key not in built_in}


def remember(links: Sequence[Strategy]) -> list[dict[str, Any]]:
    """What the attributes are now, to be told from what they will be (:func:`strategy_state`)."""
    return [{key: _snapshot(value) for key, value in _attributes(link).items()} for link in links]


def _snapshot(value: Any) -> Any:
    """The value; of a list or dict of plain values a copy."""
    return copy.deepcopy(value) if _is_nested(value) else value


def _is_nested(value: object) -> bool:
    if isinstance(value, dict) and all(isinstance(key, _PLAIN) for key in value):
        value = list(value.values())
    return isinstance(value, list | tuple) and all(isinstance(one, _PLAIN) or _is_nested(one) for one in value)


def strategy_state(
    links: Sequence[Strategy], before: Sequence[Mapping[str, Any]], arrays: Arrays, told: set[tuple[int, str]]
) -> Facts:
    """Encode the attributes of each link: numbers and text that have changed since :func:`remember`, all data.

    Of what cannot be kept the log tells once: ``told`` remembers it.
    """
    states = []
    for place, (link, old) in enumerate(zip(links, before, strict=True)):
        state = {}
        for key, value in _attributes(link).items():
            plain = isinstance(value, _PLAIN) or _is_nested(value)
            same = key in old and (old[key] is value or (plain and type(old[key]) is type(value) and old[key] == value))
            if isinstance(value, Strategy) or (same and plain):
                continue
            try:
                state[key] = encode(value, f"strategy/{place}/{key}", arrays)
            except TypeError as error:
                if (not same or _may_change(value)) and (place, key) not in told:
                    told.add((place, key))
                    log(
                        *(WARNING, "rebasin: %s.%s is not kept in the checkpoint: %s"),
                        *(type(link).__name__, key, error),
                    )
        states.append({"class": type(link).__name__, "state": state})
    return states


def _may_change(value: object) -> bool:
    """Whether a value can be other than it was though it is the same object: what is compared by value cannot."""
    fixed = isroutine(value) or isinstance(value, type | partial)
    return not fixed and (isinstance(value, Tensor) or type(value).__hash__ in (None, object.__hash__))


def random_state(arrays: Arrays) -> Facts:
    """Encode the states of Python's, NumPy's and torch's global generators."""
    arrays["random/torch"] = torch.get_rng_state().numpy()
    version, words, gauss = random.getstate()
    arrays["random/python"] = np.array(words, dtype=np.uint32)
    numpy = encode(np.random.get_state(legacy=False), "random/numpy", arrays)
    return {"python": [version, gauss], "numpy": numpy}


def restore_random(facts: Facts, arrays: Mapping[str, np.ndarray]) -> None:
    """Set the global generators to what was kept."""
    version, gauss = facts["python"]
    random.setstate((version, tuple(arrays["random/python"].tolist()), gauss))
    np.random.set_state(decode(facts["numpy"], arrays))
    torch.set_rng_state(torch.from_numpy(arrays["random/torch"]))
