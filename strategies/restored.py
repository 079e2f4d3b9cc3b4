"""A kept state is given back to the strategies that it came from, if it can be theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import FedAvgM, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from fedrebasin.errors import UsageError
from fedrebasin.strategies.pairs import to_pairs
from fedrebasin.strategies.records import select_arrays
from fedrebasin.strategies.state import Facts, decode

_NUMBERS = (int, float, np.generic, np.ndarray, Tensor)


def restore_strategies(links: Sequence[Strategy], facts: Facts, arrays: Mapping[str, np.ndarray]) -> None:
    """Give each link the attributes that were kept.

    Raises
    ------
    UsageError
        If the checkpoint was made by other strategies.
    ValueError
        If it holds text for a number, a number for text, or anything for a strategy.
    """
    kept, here = [state["class"] for state in facts], [type(link).__name__ for link in links]
    if kept != here:
        raise UsageError(
            f"checkpoint_dir: the run there used {' around '.join(kept)}, this one {' around '.join(here)}; take the "
            "same strategy, or another folder"
        )
    for link, state in zip(links, facts, strict=True):
        for key, item in state["state"].items():
            value = decode(item, arrays)
            present: Any = getattr(link, key, None)
            if "state" in item and present is None:
                log(
                    *(WARNING, "rebasin: %s.%s is not there to take up its state; make it where the strategy is made"),
                    *(type(link).__name__, key),
                )
            elif "state" in item:
                present.load_state_dict(value)
            elif isinstance(present, dict) and isinstance(value, dict):  # it may be a Counter
                value = _renewed(present, value)
                present.clear()
                present.update(value)
            elif not _fits(present, value):
                raise ValueError(f"{type(link).__name__}.{key} = {value!r}, where {present!r} is set")
            elif not callable(present) and not key.startswith("__"):  # it may be first set in a round
                setattr(link, key, _renewed(present, value))


def _fits(present: Any, value: Any) -> bool:
    if present is None or value is None:
        return not isinstance(present, Strategy)
    if isinstance(present, str) or isinstance(value, str):
        return isinstance(present, str) and isinstance(value, str)
    return not isinstance(present, Strategy) and (not isinstance(present, int | float) or isinstance(value, _NUMBERS))


def _renewed(present: Any, value: Any) -> Any:
    """The value; a tensor that takes gradients is written into the one that is there, which an optimizer may hold."""
    if isinstance(present, dict) and isinstance(value, dict):
        return {key: _renewed(present.get(key), item) for key, item in value.items()}
    if isinstance(present, list | tuple) and isinstance(value, list | tuple) and len(present) == len(value):
        return type(value)(_renewed(old, new) for old, new in zip(present, value, strict=True))
    if isinstance(present, Tensor) and isinstance(value, Tensor) and present.requires_grad:
        with torch.no_grad():
            return present.copy_(value.reshape_as(present))
    return value


def check_moments(links: Sequence[Strategy], model: ArrayRecord) -> None:
    """See that what Flower's server optimizers keep for each tensor has that tensor's shape, of a complex one in pairs.

    Raises
    ------
    ValueError
        If it has not.
    """
    params = to_pairs(select_arrays(model, list(model)))
    for link in links:
        if not isinstance(link, FedOpt | FedAvgM):
            continue
        current = getattr(link, "current_arrays", None)
        for kind in ("current_arrays", "m_t", "v_t", "momentum_vector"):
            held = getattr(link, kind, None)
            if isinstance(held, list) and current is not None:  # FedAvgM's has no names
                held = dict(zip(current, held, strict=True))
            for name, array in held.items() if isinstance(held, Mapping) else ():
                if name in params and tuple(array.shape) != tuple(params[name].shape):
                    raise ValueError(
                        f"{type(link).__name__}.{kind} has {name!r} as {tuple(array.shape)}, the model has "
                        f"{tuple(params[name].shape)}"
                    )
