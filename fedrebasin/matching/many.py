"""Many models without a reference: merge-many (Git Re-Basin, Algorithm 3) with coefficients."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.coefficients import check_coefficients
from fedrebasin.errors import RebasinError
from fedrebasin.matching.result import ManyMatching
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms, compose, identity_perms, invert
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec

MANY_METHODS = ("merge-many",)
_MAX_ROUNDS = 50
_TOLERANCE = 1e-7


def match_many(
    spec: PermutationSpec,
    models: Sequence[Mapping[str, Tensor]],
    *,
    coefficients: Sequence[float] | None = None,
    method: str = "merge-many",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ManyMatching:
    """Find one permutation dict for each model so that all share one order of units.

    Every model is first aligned to the heaviest one; then, in random order, each is aligned to the weighted mean
    of the others until nothing moves. Each step raises ``sum_{p<q} c_p c_q <P_p M_p, P_q M_q>``.

    Parameters
    ----------
    spec : PermutationSpec
    models : sequence of dict of str to Tensor
        State dicts of the spec's architecture; none is changed.
    coefficients : sequence of float, optional
        Averaging weights, scaled to sum 1; equal by default. The heaviest model keeps its order.
    method : {"merge-many"}
    seed : int
        Seed of the visiting order.

    Returns
    -------
    ManyMatching

    Raises
    ------
    RebasinError
        If the method is unknown, or coefficients do not fit.
    SpecMismatchError
        If a state dict does not fit the spec.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Algorithm 3.

    Examples
    --------
    >>> from fedrebasin import random_perms, trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> spec, state = trace(net, (torch.randn(2, 4),)), net.state_dict()
    >>> copies = [permute(spec, random_perms(spec, seed), state) for seed in range(3)]
    >>> found = match_many(spec, copies)
    >>> aligned = [permute(spec, perms, copy)["0.weight"] for perms, copy in zip(found.perms, copies)]
    >>> bool((aligned[0] == aligned[1]).all() and (aligned[0] == aligned[2]).all())
    True
    """
    if method not in MANY_METHODS:
        raise RebasinError(f"method: expected one of {', '.join(MANY_METHODS)}; got {method!r}")
    started = time.perf_counter()
    weights = check_coefficients(coefficients, len(models))
    generator = torch.Generator().manual_seed(seed)
    heaviest = weights.index(max(weights))
    perms = [identity_perms(spec) for _ in models]
    aligned = [_floats(spec, model, device) for model in models]
    before = _objective(spec, aligned, weights)
    for index in range(len(models)):
        if index != heaviest and weights[index] > 0:
            perms[index] = weight_matching(spec, aligned[heaviest], aligned[index], seed=seed).perms
            aligned[index] = permute(spec, perms[index], aligned[index])
    total = _mean(aligned, weights)
    history = [before, _objective(spec, aligned, weights)]
    while len(models) > 2 and len(history) < _MAX_ROUNDS:
        moved = False
        for index in torch.randperm(len(models), generator=generator).tolist():
            if weights[index] > 0:
                moved |= _realign(spec, aligned, weights, perms, total, index, seed)
        if not moved:
            break
        history.append(_objective(spec, aligned, weights))
        if history[-1] <= history[-2] + _TOLERANCE * abs(history[-2]):
            break
    frame = invert(spec, perms[heaviest])
    perms = [compose(spec, own, frame) for own in perms]
    return ManyMatching(perms, history[-1], before, tuple(history), time.perf_counter() - started)


def _realign(
    spec: PermutationSpec,
    aligned: list[dict[str, Tensor]],
    weights: list[float],
    perms: list[Perms],
    total: dict[str, Tensor],
    index: int,
    seed: int,
) -> bool:
    """Align one model to the mean of the others; ``total`` holds the mean of all and is kept up to date."""
    weight = weights[index]
    others = {name: tensor - weight * aligned[index][name].double() for name, tensor in total.items()}
    reference = {name: tensor.to(aligned[index][name].dtype) for name, tensor in others.items()}
    matching = weight_matching(spec, reference, aligned[index], seed=seed)
    if matching.moved_fraction == 0:
        return False
    aligned[index] = permute(spec, matching.perms, aligned[index])
    perms[index] = compose(spec, perms[index], matching.perms)
    for name, tensor in others.items():
        total[name] = tensor + weight * aligned[index][name].double()
    return True


def _floats(spec: PermutationSpec, model: Mapping[str, Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
    spec.check_state(model, "models")
    return {name: tensor.detach().to(device) if device else tensor.detach() for name, tensor in model.items()}


def _mean(aligned: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    result = {}
    for name in aligned[0]:
        result[name] = torch.zeros_like(aligned[0][name], dtype=torch.float64)
        for model, weight in zip(aligned, weights, strict=True):
            result[name] += weight * model[name].double()
    return result


def _objective(spec: PermutationSpec, aligned: list[dict[str, Tensor]], weights: list[float]) -> float:
    """``sum_{p<q} c_p c_q <M_p, M_q> = (|sum c M|^2 - sum c^2 |M|^2) / 2`` over the tied parameters."""
    tied = {axis.name for axes in spec.tied.values() for axis in axes} - set(spec.buffers)
    mean = _mean([{name: model[name] for name in sorted(tied)} for model in aligned], weights)
    own = sum(
        weight**2 * float(model[name].double().square().sum())
        for model, weight in zip(aligned, weights, strict=True)
        for name in tied
    )
    return (sum(float(tensor.square().sum()) for tensor in mean.values()) - own) / 2
