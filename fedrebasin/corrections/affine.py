"""An affine map per channel behind a layer or norm: the machinery of REPAIR and its kin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches
from fedrebasin.corrections.moments import Moments, all_moments, output_moments, site_moments
from fedrebasin.corrections.passes import Batch, Memory, Runner, hold
from fedrebasin.corrections.sites import Site, check_found, find_calls
from fedrebasin.corrections.working import begin, extract, load, warn_of_few
from fedrebasin.errors import RebasinError

#: A channel whose standard deviation is below this share of its layer's largest is dead.
_DEAD = 1e-6

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Affine:
    """Which of mean and standard deviation are set to the goals, and how far a gain may go."""

    scale: bool = True
    shift: bool = True
    max_gain: float = 10.0

    def __post_init__(self) -> None:
        if not self.max_gain >= 1:
            raise RebasinError(f"max_gain: expected 1 or more; got {self.max_gain}")


@dataclass(frozen=True)
class Work:
    """What a correction works on: a private network, its layers and norms, the data, the ends' coefficients."""

    model: nn.Module
    calls: list[Site]
    batches: Batches
    weights: list[float]

    @property
    def sites(self) -> list[Site]:
        """Those that are corrected, in order."""
        return [site for site in self.calls if site.corrected]


def begin_at_sites(
    net: nn.Module,
    merged: State,
    ends: Sequence[State],
    calibration: Iterable[Any],
    coefficients: Sequence[float] | None,
    device: torch.device | str | None,
) -> Work:
    """Check what a caller gave and find the sites; ``model`` holds ``merged``."""
    model, batches, weights = begin(net, merged, ends, calibration, coefficients, device)
    work = Work(model, find_calls(model, batches), batches, weights)
    check_found(work.sites)
    return work


def correct_sites(
    net: nn.Module,
    merged: State,
    ends: Sequence[State],
    calibration: Iterable[Any],
    *,
    affine: Affine,
    sequential: bool,
    memory: int,
    coefficients: Sequence[float] | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Measure the ends, then correct every site of the merged network towards them; see :func:`repair`."""
    budget = Memory(memory)
    work = begin_at_sites(net, merged, ends, calibration, coefficients, device)
    model, batches = work.model, work.batches
    goals = goals_of(model, ends, work.weights, batches, work.sites, stacklevel=6)
    load(model, merged)
    measured = {} if sequential else all_moments(model, batches, work.sites)
    held = hold(batches, budget) if sequential else None
    runner = Runner(model, work.calls, budget, keep=held is not None)
    for index, site in enumerate(work.calls):
        if not site.corrected:
            continue
        if not sequential:
            moments = measured[site.name]
        elif site.by_module:
            moments = site_moments(model, batches, site)
        else:
            moments = _moments_at(runner, index, site, held or ((args, kwargs) for args, kwargs, _ in batches))
        apply_affine(model, site, moments, goals[site.name], affine)
    return extract(model, merged)


def _moments_at(runner: Runner, index: int, site: Site, source: Iterable[Batch]) -> Moments:
    """What :func:`site_moments` gives, in passes that go on from what earlier ones have kept."""
    moments = Moments()
    for number, batch in enumerate(source):
        if site.running is not None:
            moments.add(runner.input(index, number, batch), site.dim)
        else:
            moments.add(runner.output(index, number, batch, final=False), site.dim)
    moments.check(site.name)
    return moments


def apply_affine(model: nn.Module, site: Site, moments: Moments, goal: tuple[Tensor, Tensor], affine: Affine) -> None:
    """Correct one site by the moments of its output; of its input, if it is a BatchNorm."""
    if site.running is not None:
        moments = refresh(model, site, moments, moments.squares / max(1, moments.count - 1))
    goal_mean, goal_std = goal
    fuse(
        *(model, site, moments),
        goal_mean if affine.shift else moments.mean,
        goal_std if affine.scale else moments.std,
        affine.max_gain,
    )


def goals_of(
    model: nn.Module,
    ends: Sequence[State],
    weights: list[float],
    batches: Batches,
    sites: list[Site],
    *,
    stacklevel: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    means: dict[str, Tensor] = {}
    stds: dict[str, Tensor] = {}
    for end, weight in zip(ends, weights, strict=True):
        if not weight:
            continue
        load(model, end)
        found = output_moments(model, batches, sites)
        few = min(moments.count for moments in found.values())
        warn_of_few(few, "observations per channel make noisy statistics", stacklevel=stacklevel)
        for name, moments in found.items():
            means[name] = means.get(name, 0.0) + weight * moments.mean
            stds[name] = stds.get(name, 0.0) + weight * moments.std
    return {site.name: (means[site.name], stds[site.name]) for site in sites}


def refresh(model: nn.Module, site: Site, into: Moments, variance: Tensor) -> Moments:
    """Give a BatchNorm the mean of its input, and ``variance``; the moments of what it gives in evaluation mode.

    Parameters
    ----------
    into : Moments
        Of the input; for several nodes, the mean of theirs.
    variance : Tensor
        Of the input over all examples, unbiased as torch has it.
    """
    assert site.running is not None
    own = model.state_dict()
    own[site.running[0]].copy_(into.mean)
    own[site.running[1]].copy_(variance)
    scale = torch.ones_like(variance) if site.weight is None else own[site.weight].double().abs()
    mean = torch.zeros_like(variance) if site.bias is None else own[site.bias].double()
    return Moments.of(into.count, mean, scale.square() * into.squares / (variance + site.eps))


def fuse(model: nn.Module, site: Site, moments: Moments, goal_mean: Tensor, goal_std: Tensor, max_gain: float) -> None:
    """Change weight and bias so that the output's moments become the goals; without a weight nothing can be."""
    if site.weight is None:
        return
    std = moments.std
    alive = (std > _DEAD * std.max()) & (goal_std > _DEAD * goal_std.max())
    gain = torch.where(alive, goal_std / std, 1.0).clamp(1 / max_gain, max_gain)
    own = model.state_dict()
    weight = own[site.weight]
    weight.mul_(gain.view([-1 if dim == site.weight_dim else 1 for dim in range(weight.ndim)]).to(weight.dtype))
    if site.bias is not None:
        bias = own[site.bias]
        repaired = (bias.double() - moments.mean) * gain + goal_mean
        bias.copy_(torch.where(alive, repaired, bias.double()))
