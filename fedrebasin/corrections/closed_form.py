"""closed_form: REPAIR without a pass through the merged network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches, copied
from fedrebasin.corrections.affine import Affine, apply_affine, begin_at_sites, goals_of
from fedrebasin.corrections.moments import Moments
from fedrebasin.corrections.passes import not_reached
from fedrebasin.corrections.sites import Site
from fedrebasin.corrections.taps import tap
from fedrebasin.corrections.working import extract, working_copy


@torch.inference_mode(False)
def closed_form(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    max_gain: float = 10.0,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """REPAIR with the merged network's statistics worked out from the ends'.

    A merged unit is taken for the average ``sum_k c_k x_k`` of the ends' units, so that its mean is
    ``sum_k c_k mean_k`` and its variance ``sum_ij c_i c_j std_i std_j corr_ij``; the gain is ``goal_std`` over the root
    of that. True in the first layer; an approximation behind it, where the merged network's inputs are not the ends'.

    Parameters, result, errors and warnings as for :func:`fedrebasin.repair`; the data is read once for each end and
    once for all ends together.

    References
    ----------
    Jordan et al. (2023), "REPAIR", arXiv 2211.08403, Section 3.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ends = [net.state_dict(), net.state_dict()]
    >>> list(closed_form(net, net.state_dict(), ends, [torch.randn(200, 4)]))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    affine = Affine(max_gain=max_gain)
    work = begin_at_sites(net, merged, ends, calibration, coefficients, device)
    shares = [weight for weight in work.weights if weight]
    models = [
        working_copy(net, end, work.batches.device) for end, weight in zip(ends, work.weights, strict=True) if weight
    ]
    expected = average_moments(models, shares, work.batches, work.sites)
    other = working_copy(net, merged, device)
    goals = goals_of(other, ends, work.weights, work.batches, work.sites, stacklevel=5)
    for site in work.sites:
        apply_affine(work.model, site, expected[site.name], goals[site.name], affine)
    return extract(work.model, merged)


@torch.no_grad()
def average_moments(
    models: Sequence[nn.Module], weights: Sequence[float], batches: Batches, sites: Sequence[Site]
) -> dict[str, Moments]:
    """Moments of ``sum_k c_k x_k`` at each site: of a BatchNorm's input, of another site's output."""
    found = {site.name: Moments() for site in sites}
    total: dict[str, Tensor] = {}

    def add(weight: float) -> Callable[[Site, Tensor, Tensor], None]:
        def see(site: Site, into: Tensor, output: Tensor) -> None:
            part = weight * (into if site.running else output)
            total[site.name] = total[site.name] + part if site.name in total else part

        return see

    for args, kwargs, _ in batches:
        total.clear()
        for model, weight in zip(models, weights, strict=True):
            with tap(model, sites, add(weight)):
                own_args, own_kwargs = copied((args, kwargs))
                model(*own_args, **own_kwargs)
        for site in sites:
            if site.name not in total:
                raise not_reached(site.name)
            found[site.name].add(total[site.name], site.dim)
    for name, moments in found.items():
        moments.check(name)
    return found
