"""repair: give a merged network the activation statistics of the networks that it was merged from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin.batches import Batches, count_inputs
from fedrebasin.coefficients import check_coefficients
from fedrebasin.corrections.moments import Moments, input_moments, output_moments, site_moments
from fedrebasin.corrections.sites import Site, find_sites
from fedrebasin.corrections.working import extract, load, working_copy
from fedrebasin.errors import RebasinError

#: Below this many observations per channel the statistics are mostly noise.
_FEW = 100
#: A channel whose standard deviation is below this share of its layer's largest is dead.
_DEAD = 1e-6


def repair(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    max_gain: float = 10.0,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Set each pre-activation's mean and standard deviation to the average of the ends' (REPAIR).

    ``goal_mean = sum_k c_k mean_k`` and ``goal_std = sum_k c_k std_k``, per channel: standard deviations are
    averaged, not variances. Layer after layer in forward order, the merged layer's output is measured and an affine
    map, ``goal_std / std * (x - mean) + goal_mean``, is fused into the layer's weight and bias, so that the keys
    of the state dict stay. A BatchNorm gets the statistics of its input first.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    merged : dict of str to Tensor
        The average of ``ends``; it is not changed.
    ends : sequence of dict of str to Tensor
        The aligned state dicts.
    calibration : iterable of batches
        Inputs, no labels; read once for each end and once for each corrected layer.
    coefficients : sequence of float, optional
        The merge's; equal by default.
    max_gain : float
        Gains are kept in ``[1 / max_gain, max_gain]``. Dead channels are left alone.
    device : str, optional
        Where the network runs; by default where ``merged`` is.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``merged``.

    Raises
    ------
    CalibrationError
        If the data is empty, can be read only once, or activations are not finite.
    RebasinError
        If coefficients do not fit, ``max_gain`` is below 1, or no layer can be corrected.

    Warns
    -----
    UserWarning
        If there are fewer than 100 observations per channel.

    References
    ----------
    Jordan, Sedghi, Saukh, Entezari, Neyshabur (2023), "REPAIR", arXiv 2211.08403.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ends = [net.state_dict(), net.state_dict()]
    >>> list(repair(net, net.state_dict(), ends, [torch.randn(200, 4)]))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if max_gain < 1:
        raise RebasinError(f"max_gain: expected 1 or more; got {max_gain}")
    weights = check_coefficients(coefficients, len(ends))
    model = working_copy(net, merged, device)
    where = device if device is not None else next(iter(merged.values())).device
    batches = Batches(calibration, inputs=count_inputs(net), device=where)
    sites = find_sites(model, batches)
    if not sites:
        raise RebasinError(
            "net: expected a norm, or a hidden linear or convolution layer with a bias, to repair; found none"
        )
    goals = _goals(model, ends, weights, batches, sites)
    load(model, merged)
    for site in sites:
        goal_mean, goal_std = goals[site.name]
        module = model.get_submodule(site.name)
        if isinstance(module, _BatchNorm):
            moments = _reset(module, input_moments(model, batches, site))
        else:
            moments = site_moments(model, batches, site)
        if module.weight is not None:
            _fuse(module, site, moments, goal_mean, goal_std, max_gain)
    return extract(model, merged)


def _goals(
    model: nn.Module, ends: Sequence[Mapping[str, Tensor]], weights: list[float], batches: Batches, sites: list[Site]
) -> dict[str, tuple[Tensor, Tensor]]:
    means: dict[str, Tensor] = {}
    stds: dict[str, Tensor] = {}
    for end, weight in zip(ends, weights, strict=True):
        load(model, end)
        found = output_moments(model, batches, sites)
        few = min((moments.count for moments in found.values()), default=_FEW)
        if few < _FEW:
            warnings.warn(
                f"calibration: {few} observations per channel make noisy statistics; {_FEW} and more would do",
                stacklevel=3,
            )
        for name, moments in found.items():
            means[name] = means.get(name, 0.0) + weight * moments.mean
            stds[name] = stds.get(name, 0.0) + weight * moments.std
    return {site.name: (means[site.name], stds[site.name]) for site in sites}


def _reset(module: nn.Module, into: Moments) -> Moments:
    """Give a BatchNorm the statistics of its input; the moments of its output follow."""
    assert isinstance(module, _BatchNorm)
    variance = into.std.square()
    output = Moments()
    output.count = into.count
    output.mean = torch.zeros_like(into.mean) if module.bias is None else module.bias.detach().double()
    scale = torch.ones_like(variance) if module.weight is None else module.weight.detach().double().abs()
    if module.running_mean is not None and module.running_var is not None:
        module.running_mean.copy_(into.mean)
        module.running_var.copy_(variance * into.count / max(1, into.count - 1))
    output._squares = scale.square() * variance / (variance + module.eps) * into.count
    return output


def _fuse(
    module: nn.Module, site: Site, moments: Moments, goal_mean: Tensor, goal_std: Tensor, max_gain: float
) -> None:
    std = moments.std
    alive = (std > _DEAD * std.max()) & (goal_std > _DEAD * goal_std.max())
    gain = torch.where(alive, goal_std / std, 1.0).clamp(1 / max_gain, max_gain)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        shape = [-1 if dim == site.weight_dim else 1 for dim in range(weight.ndim)]
        weight.mul_(gain.view(shape).to(weight.dtype))
        if isinstance(bias, Tensor):
            repaired = (bias.double() - moments.mean) * gain + goal_mean
            bias.copy_(torch.where(alive, repaired, bias.double()))
