"""Averages of state dicts: two models, many models, and everything in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import as_called
from fedrebasin.check import proved_trace
from fedrebasin.coefficients import check_coefficients, wide_type
from fedrebasin.corrections.methods import CorrectionSetting, check_data, correct
from fedrebasin.errors import CalibrationError, NoSiteError, RebasinError, SpecMismatchError
from fedrebasin.held_out import split_calibration
from fedrebasin.matching import match_many, weight_matching
from fedrebasin.modules import deep_copy
from fedrebasin.permute import like_state, permute
from fedrebasin.selection import corrected, names_of, select_candidate
from fedrebasin.spec import PermutationSpec

State = Mapping[str, Tensor]


def align(
    spec: PermutationSpec,
    reference: State,
    model: State,
    *,
    seed: int = 0,
    restarts: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Put ``model``'s hidden units into the order of ``reference``: weight matching, then ``permute``.

    Parameters and errors as for :func:`fedrebasin.weight_matching`.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = trace(net, (torch.randn(2, 4),))
    >>> list(align(spec, net.state_dict(), net.state_dict()))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    matching = weight_matching(spec, reference, model, seed=seed, restarts=restarts, device=device)
    return permute(spec, matching.perms, model)


def interpolate(reference: State, model: State, lam: float) -> dict[str, Tensor]:
    """``(1 - lam) * reference + lam * model``, in float64, cast back to the reference's dtypes.

    Parameters
    ----------
    reference, model : dict of str to Tensor
        State dicts with the same keys and shapes.
    lam : float
        In [0, 1]: 0 is the reference, 1 the model; both come back with equal values.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``reference``.

    Raises
    ------
    SpecMismatchError
        If keys or shapes differ.
    RebasinError
        If ``lam`` is outside [0, 1].

    Examples
    --------
    >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)
    {'w': tensor([0.2500, 0.2500])}
    """
    if not 0 <= lam <= 1:
        raise RebasinError(f"lam: expected a number in [0, 1]; got {lam}")
    return merge([reference, model], coefficients=[1 - lam, lam])


def merge(models: Sequence[State], *, coefficients: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted average of state dicts.

    Parameters
    ----------
    models : sequence of dict of str to Tensor
        With the same keys and shapes. Integer buffers (counters) come from the heaviest model.
    coefficients : sequence of float, optional
        Not negative; scaled to sum 1. By default all models weigh the same.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of the first model.

    Raises
    ------
    SpecMismatchError
        If keys or shapes differ.
    RebasinError
        If there are no models, or coefficients do not fit.

    Examples
    --------
    >>> merge([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], coefficients=[1, 3])
    {'w': tensor([0.7500])}
    """
    weights = check_coefficients(coefficients, len(models))
    first = models[0]
    for index, model in enumerate(models[1:], 1):
        if list(model) != list(first) and set(model) != set(first):
            odd = sorted(set(model) ^ set(first))[0]
            raise SpecMismatchError(f"models[{index}]: expected the tensors of models[0]; {odd!r} is in one only")
        for name, tensor in first.items():
            if model[name].shape != tensor.shape:
                raise SpecMismatchError(
                    f"models[{index}]: expected {name!r} as {tuple(tensor.shape)}; got {tuple(model[name].shape)}"
                )
    heaviest = models[weights.index(max(weights))]

    def average(name: str, tensor: Tensor) -> Tensor:
        wide = wide_type(tensor)
        if wide is None:
            return heaviest[name].to(tensor.device, tensor.dtype, copy=True)
        total = torch.zeros_like(tensor, dtype=wide)
        for model, weight in zip(models, weights, strict=True):
            if weight:
                total.add_(model[name].to(tensor.device, wide), alpha=weight)
        return total.to(tensor.dtype)

    return like_state(first, {name: average(name, tensor) for name, tensor in first.items()})


def merge_modules(
    modules: Sequence[nn.Module],
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    coefficients: Sequence[float] | None = None,
    correction: str | Sequence[str] | None = "default",
    select: str | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Trace, prove, match, average and, with calibration data, correct: one new module out of several.

    Parameters
    ----------
    modules : sequence of nn.Module
        Of one architecture; none is changed.
    example_inputs : Tensor, tuple or dict
        As for :func:`fedrebasin.trace`.
    calibration : iterable of batches, optional
        Inputs for the correction; without them the default corrects nothing.
    coefficients : sequence of float, optional
        As for :func:`merge`.
    correction : str, optional
        What follows the average: a name in :data:`fedrebasin.corrections.methods.CORRECTIONS`, such as
        ``"least-squares"``, or ``None``; several of them where ``select`` is given. ``"default"`` is ``"repair"`` where
        the network has a layer that it can correct, otherwise ``None``.
    select : {"calibration"}, optional
        Keep the best of: the average of the models as they are and of the aligned ones, each as it is and with each
        correction; and each model alone, where there is a loss. A quarter of ``calibration`` is kept apart for it, and
        the figures are logged (level INFO). See :func:`fedrebasin.select_candidate`.
    loss : callable, optional
        For ``select`` only: ``loss(output, target)``, a mean over the batch; with it and targets the best is chosen by
        loss, otherwise by agreement with the models' ensemble.
    seed : int
        Of the proof, of matching, and of which examples are kept apart.

    Returns
    -------
    nn.Module
        A copy of the first module with the merged weights, in evaluation mode.

    Warns
    -----
    UserWarning
        For what the trace leaves fixed although it need not (``spec.notes``); where the default corrects nothing.

    Raises
    ------
    RebasinError
        If there is no such correction, it lacks its calibration data, or a loss comes without ``select``; as the
        functions that are called raise.

    Examples
    --------
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(3)]
    >>> merge_modules(nets, (torch.randn(2, 4),))(torch.zeros(1, 4)).shape
    torch.Size([1, 2])
    """
    weights = check_coefficients(coefficients, len(modules))
    corrections = names_of("repair" if correction == "default" else correction, several=select is not None)
    if select not in (None, "calibration"):
        raise RebasinError(f"select: expected None or 'calibration'; got {select!r}")
    if select is not None and calibration is None:
        raise CalibrationError(f"select={select!r} needs calibration, a collection of input batches")
    if loss is not None and select is None:
        raise RebasinError("loss: only select='calibration' uses it; leave it out with select=None")
    if correction == "default" and calibration is None:
        corrections = ()
    for name in corrections:
        check_data(name, calibration)
    spec = proved_trace(modules[0], example_inputs, seed=seed)
    states = [module.state_dict() for module in modules]
    found = match_many(spec, states, coefficients=weights, seed=seed)
    aligned = [permute(spec, perms, state) for perms, state in zip(found.perms, states, strict=True)]
    merged: Mapping[str, Tensor] = merge(aligned, coefficients=weights)
    if select is not None and calibration is not None:
        fit, held_out = split_calibration(modules[0], as_called(calibration, example_inputs), seed=seed)
        setting = CorrectionSetting(modules[0], fit, weights, example_inputs, seed)
        candidates = corrected("plain", merge(states, coefficients=weights), states, setting, corrections)
        candidates |= corrected("aligned", merged, aligned, setting, corrections)
        alone = {f"model {place}": state for place, state in enumerate(states)}
        merged = select_candidate(
            *(modules[0], candidates, as_called(held_out, example_inputs)),
            ends=states,
            coefficients=weights,
            alone=alone,
            loss=loss,
        ).state
    elif corrections:
        setting = CorrectionSetting(modules[0], calibration, weights, example_inputs, seed)
        try:
            merged = correct(corrections[0], setting, merged, aligned)
        except NoSiteError as error:
            if correction != "default":
                raise
            warnings.warn(f"the merged model is not corrected: {error}", stacklevel=2)
    result = deep_copy(modules[0])
    result.load_state_dict(merged)
    return result.eval()
