"""What follows the aggregation: REPAIR, or new BatchNorm statistics, on the server's calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from logging import WARNING
from typing import Any

import torch
from flwr.common.logger import log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin import repair, reset_batchnorm
from fedrebasin.batches import Batches
from fedrebasin.errors import CalibrationError, RebasinError, UsageError

State = dict[str, Tensor]
Device = torch.device | None


def has_running_statistics(model: nn.Module | None) -> bool:
    """Tell whether a BatchNorm keeps running statistics.

    Examples
    --------
    >>> has_running_statistics(nn.BatchNorm1d(3)), has_running_statistics(nn.Linear(3, 3))
    (True, False)
    """
    norms = [] if model is None else [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return any(norm.track_running_stats for norm in norms)


def check_calibration(
    correction: str | None, model: nn.Module | None, calibration: Any, *, inputs: int = 1, device: Device = None
) -> None:
    """Refuse a correction that lacks its model or data, and data that the model cannot read in every round.

    The correction is tried on the first batch: in a round, what fails is only logged.

    Examples
    --------
    >>> check_calibration("repair", nn.Linear(2, 1), None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedrebasin.errors.CalibrationError: correction='repair' needs calibration, a collection of input batches; ...
    """
    if correction is not None and calibration is None:
        raise CalibrationError(
            f"correction={correction!r} needs calibration, a collection of input batches; give calibration=batches"
        )
    if calibration is None:
        return
    batches = Batches(calibration, inputs=inputs)
    next(iter(batches))
    if correction is None:
        return
    if model is None:
        raise UsageError(
            f"correction={correction!r} runs the model on calibration data, and a spec alone cannot; give model= too, "
            "or correction=None"
        )
    first, state = [next(iter(calibration))], model.state_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few observations: the first batch is not all
            _run(correction, model, state, [state], first, coefficients=[1.0], device=device)
    except RebasinError:
        raise
    except Exception as error:
        raise CalibrationError(f"calibration: the model cannot run on its first batch: {error}") from error


def correct(
    correction: str,
    model: nn.Module,
    merged: State,
    ends: Sequence[State],
    calibration: Any,
    *,
    coefficients: Sequence[float],
    device: Device,
) -> State | None:
    """Correct the merged model, or log why not and return ``None``.

    Parameters
    ----------
    correction : {"repair", "reset-batchnorm"}
    ends : sequence of state dict
        The aligned replies, whose statistics are REPAIR's goals; not used by ``"reset-batchnorm"``.
    """
    try:
        corrected = _run(correction, model, merged, ends, calibration, coefficients=coefficients, device=device)
    except Exception as error:  # noqa: BLE001 - the user's model and data may raise anything, and the run must go on
        log(
            WARNING, "rebasin: %s failed (%s: %s); this round is not corrected", correction, type(error).__name__, error
        )
        return None
    bad = next((name for name, tensor in corrected.items() if not bool(torch.isfinite(tensor).all())), None)
    if bad is not None:
        log(WARNING, "rebasin: %s made %r infinite or NaN; this round is not corrected", correction, bad)
        return None
    return dict(corrected)


def _run(
    correction: str,
    model: nn.Module,
    merged: State,
    ends: Sequence[State],
    calibration: Any,
    *,
    coefficients: Sequence[float],
    device: Device,
) -> State:
    if correction == "repair":
        return repair(model, merged, list(ends), calibration, coefficients=list(coefficients), device=device)
    return reset_batchnorm(model, merged, calibration, device=device)
