"""Networks with different heads: their trunks are aligned, averaged and corrected, and each keeps its head."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import AsCalled
from fedrebasin.check import proved_trace
from fedrebasin.coefficients import check_coefficients
from fedrebasin.corrections import methods
from fedrebasin.corrections.layers import Layer, find_steps
from fedrebasin.corrections.working import batches_for, working_copy
from fedrebasin.errors import RebasinError
from fedrebasin.merge import merge
from fedrebasin.modules import deep_copy
from fedrebasin.permute import like_state, permute
from fedrebasin.spec import PermutationSpec
from fedrebasin.trunk import match_trunks, trunk_tensors

LOGGER = logging.getLogger("fedrebasin")

State = Mapping[str, Tensor]
#: Those that go from layer to layer: what they do to the trunk depends on its own activations alone.
TRUNK_CORRECTIONS = ("repair", "reset-batchnorm", "rescale", "reshift", "closed-form", "least-squares", "regmean")


def merge_trunks(
    specs: Sequence[PermutationSpec],
    models: Sequence[State],
    *,
    until: str,
    coefficients: Sequence[float] | None = None,
    method: str = "merge-many",
    seed: int = 0,
    device: torch.device | str | None = None,
    correction: str = "",
    net: nn.Module | None = None,
    calibration: Iterable[Any] | None = None,
) -> list[dict[str, Tensor]]:
    """Align and average the models' trunks up to ``until``; each model keeps its own head, fitted to the trunk.

    Parameters
    ----------
    specs, models, until, coefficients, method, seed, device
        As for :func:`match_trunks`.
    correction : {"", "repair", "reset-batchnorm", "rescale", "reshift", "closed-form", "least-squares", "regmean"}
        Corrects the shared trunk, by the activations of all aligned trunks; the heads stay as they are. A layer whose
        BatchNorm belongs to the heads is not solved (the log names it); let ``until`` be the BatchNorm.
    net : nn.Module, optional
        Of the first model's architecture, for the correction; its own weights are not used.
    calibration : iterable of batches, optional
        Inputs for the correction, no labels.

    Raises
    ------
    RebasinError
        As :func:`match_trunks`; if the correction is unknown or looks at outputs, which heads do not share, or lacks
        ``net`` or ``calibration``.

    Returns
    -------
    list of dict of str to Tensor
        One whole state dict for each model, with its keys and shapes.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (2, 5)]
    >>> specs = [trace(net, (torch.randn(2, 4),)) for net in nets]
    >>> one, other = merge_trunks(specs, [net.state_dict() for net in nets], until="0")
    >>> bool((one["0.weight"] == other["0.weight"]).all()), other["2.weight"].shape
    (True, torch.Size([5, 8]))
    """
    weights = check_coefficients(coefficients, len(models))
    found = match_trunks(specs, models, until=until, coefficients=weights, method=method, seed=seed, device=device)
    names = trunk_tensors(specs[0], until)
    aligned = [permute(spec, perms, model) for spec, perms, model in zip(specs, found.perms, models, strict=True)]
    trunks = [{name: state[name] for name in names} for state in aligned]
    shared = merge(trunks, coefficients=weights)
    if correction:
        if correction not in TRUNK_CORRECTIONS or net is None or calibration is None:
            raise RebasinError(
                f"correction: expected one of {', '.join(TRUNK_CORRECTIONS)}, with net and calibration; got "
                f"{correction!r}" + (" without them" if net is None or calibration is None else "")
            )
        # with one head for all, so that the activations of the trunks alone differ
        ends = [{**aligned[0], **trunk} for trunk in trunks]
        inputs = AsCalled(calibration, specs[0].inputs)
        setting = methods.CorrectionSetting(net, inputs, weights, device=device)
        corrected = methods.correct(correction, setting, {**aligned[0], **shared}, ends)
        stays = _across_the_cut(net, setting.batches, corrected, names, until, device)
        shared = {name: shared[name] if name in stays else corrected[name] for name in names}
    return [
        like_state(model, {**state, **{name: tensor.to(state[name]).clone() for name, tensor in shared.items()}})
        for model, state in zip(models, aligned, strict=True)
    ]


def _across_the_cut(
    net: nn.Module,
    batches: Iterable[Any],
    state: State,
    names: Sequence[str],
    until: str,
    device: torch.device | str | None,
) -> set[str]:
    """Tensors of layers whose BatchNorm is the heads': a solution of both at once is none of the layer alone."""
    args, kwargs, _ = next(iter(batches_for(net, state, batches, device)))
    steps, _ = find_steps(working_copy(net, state, device), args, kwargs)
    stays = set[str]()
    for step in steps:
        norm = [] if step.norm is None else [key for key in state if key.startswith(f"{step.norm}.")]
        if isinstance(step, Layer) and step.weight in names and not set(norm) <= set(names):
            LOGGER.info("merge_trunks: %r stays averaged: its BatchNorm lies beyond %r", step.weight, until)
            stays.update([step.weight, step.bias or step.weight, *norm])
    return stays


def merge_trunk_modules(
    modules: Sequence[nn.Module],
    example_inputs: Any,
    *,
    until: str,
    coefficients: Sequence[float] | None = None,
    method: str = "merge-many",
    seed: int = 0,
    correction: str = "",
    calibration: Iterable[Any] | None = None,
) -> list[nn.Module]:
    """Trace, prove, match and average the trunks of modules that have different heads: one new module for each.

    Parameters
    ----------
    modules : sequence of nn.Module
        Alike up to ``until``; none is changed.
    example_inputs : Tensor, tuple or dict
        As for :func:`fedrebasin.trace`, good for every module.
    until, coefficients, method, seed, correction, calibration
        As for :func:`merge_trunks`.

    Returns
    -------
    list of nn.Module
        Copies, in evaluation mode, that share the trunk's weights.

    Raises
    ------
    RebasinError
        As the functions that are called raise.

    Examples
    --------
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (2, 5)]
    >>> [merged(torch.zeros(1, 4)).shape[1] for merged in merge_trunk_modules(nets, (torch.randn(2, 4),), until="0")]
    [2, 5]
    """
    if not modules:
        raise RebasinError("modules: expected one or more; got none")
    specs = []
    for module in modules:  # a comprehension is a frame of its own before Python 3.12: warnings would point there
        specs.append(proved_trace(module, example_inputs, seed=seed))
    states = [module.state_dict() for module in modules]
    merged = merge_trunks(
        specs,
        states,
        until=until,
        coefficients=coefficients,
        method=method,
        seed=seed,
        correction=correction,
        net=modules[0],
        calibration=calibration,
    )
    results = []
    for module, state in zip(modules, merged, strict=True):
        result = deep_copy(module)
        result.load_state_dict(state)
        results.append(result.eval())
    return results
