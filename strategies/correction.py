"""What follows the aggregation: a correction by its name, most of them on the server's calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from logging import WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from torch import Tensor, nn

from fedrebasin import PermutationSpec
from fedrebasin.batches import Batches
from fedrebasin.corrections import methods
from fedrebasin.corrections.federated import FEDERATED
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, check_data
from fedrebasin.corrections.reset import norms_with_statistics
from fedrebasin.errors import CalibrationError, RebasinError, UsageError
from fedrebasin.finite import first_not_finite
from fedrebasin.strategies.federated import Queries
from fedrebasin.strategies.records import cast_arrays, record_to_state, state_to_record

State = dict[str, Tensor]
Device = torch.device | None


def has_running_statistics(model: nn.Module | None) -> bool:
    """Tell whether a BatchNorm keeps running statistics.

    Examples
    --------
    >>> has_running_statistics(nn.BatchNorm1d(3)), has_running_statistics(nn.Linear(3, 3))
    (True, False)
    """
    return model is not None and bool(norms_with_statistics(model))


def names_running_statistics(spec: PermutationSpec) -> bool:
    """Tell whether a spec has running statistics of BatchNorm or InstanceNorm, by the names that torch gives them.

    Examples
    --------
    >>> names_running_statistics(PermutationSpec({"1.running_mean": ()}, buffers=("1.running_mean",)))
    True
    """
    return any(name.rpartition(".")[2] in ("running_mean", "running_var") for name in spec.buffers)


def default_correction(model: nn.Module | None, calibration: Any, *, guarded: bool) -> str | None:
    """REPAIR where there is data; inside privacy and selection only what looks at the merged model alone.

    Examples
    --------
    >>> default_correction(nn.Linear(3, 3), None, guarded=False), default_correction(nn.Linear(3, 3), [], guarded=False)
    (None, 'repair')
    """
    if calibration is None:
        return None
    if guarded:
        return "reset-batchnorm" if has_running_statistics(model) else None
    return "repair"


def check_calibration(
    correction: str | None,
    model: nn.Module | None,
    calibration: Any,
    *,
    inputs: int = 1,
    example_inputs: Any = None,
    device: Device = None,
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
    if correction in CORRECTIONS:
        check_data(correction, calibration)
    if calibration is not None:
        next(iter(Batches(calibration, inputs=inputs)))
    if correction not in CORRECTIONS:  # none, or a federated one, which needs no calibration
        return
    if model is None:
        raise UsageError(
            f"correction={correction!r} runs the model on calibration data, and a spec alone cannot; give model= too, "
            "or correction=None"
        )
    state, first = model.state_dict(), None if calibration is None else [next(iter(calibration))]
    setting = CorrectionSetting(model, first, [1.0], example_inputs, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few observations: the first batch is not all
            methods.correct(correction, setting, state, [state])
    except RebasinError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"calibration: the model cannot run on its first batch: {error}; give what forward takes, a dict by its "
            "parameters' names, or a pair of that and a target"
        ) from error


def needs_ends(correction: str | None) -> bool:
    """Tell whether a correction looks at the aligned replies.

    Examples
    --------
    >>> needs_ends("repair"), needs_ends("federated-repair"), needs_ends("reset-batchnorm"), needs_ends(None)
    (True, True, False, False)
    """
    return correction in FEDERATED or (correction in CORRECTIONS and CORRECTIONS[correction].ends)


def correct_record(
    correction: str | None,
    setting: CorrectionSetting,
    model: ArrayRecord,
    ends: Sequence[State],
    nodes: Sequence[int],
    queries: Queries | None,
) -> ArrayRecord | None:
    """Correct the merged model on the server's data, or by ``queries`` to the nodes that sent the ends.

    Returns
    -------
    ArrayRecord or None
        With the dtypes and order of ``model``; ``None`` where nothing is corrected.
    """
    if correction is None:
        return None
    merged = record_to_state(model)
    if queries is None:
        corrected = correct(correction, setting, merged, ends)
    else:
        corrected = queries.correct(correction, merged, ends, setting.coefficients or [], nodes)
    return None if corrected is None else cast_arrays(state_to_record(corrected), model)


def correct(correction: str, setting: CorrectionSetting, merged: State, ends: Sequence[State]) -> State | None:
    """Correct the merged model, or log why not and return ``None``.

    Parameters
    ----------
    correction : str
        One of :data:`fedrebasin.corrections.methods.CORRECTIONS`.
    ends : sequence of state dict
        The aligned replies; empty for a correction that does not look at them.
    """
    try:
        corrected = methods.correct(correction, setting, merged, ends)
    except Exception as error:  # noqa: BLE001 - the user's model and data may raise anything, and the run must go on
        log(
            WARNING, "rebasin: %s failed (%s: %s); this round is not corrected", correction, type(error).__name__, error
        )
        return None
    bad = first_not_finite(corrected, merged)
    if bad is not None:
        log(WARNING, "rebasin: %s made %r infinite or NaN; this round is not corrected", correction, bad)
        return None
    return dict(corrected)
