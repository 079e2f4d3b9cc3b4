"""Activation matching: units belong together if they respond alike to data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.assignment import solve_assignment
from fedrebasin.matching.result import Matching, inner_product
from fedrebasin.matching.rounded import start_of
from fedrebasin.matching.similarity import Key, Similarity, measure_similarity
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms, compose, identity_perms, invert
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec

#: What staying in place adds to a correlation: units between which the data does not choose do not move.
_STAY = 1e-9


@torch.inference_mode(False)
def activation_matching(
    spec: PermutationSpec,
    net: nn.Module,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    calibration: Iterable[Any],
    *,
    seed: int = 0,
    init: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Matching:
    """Permute ``model`` so that its units correlate with those of ``reference`` as much as possible over data.

    Maximises, for each permutation P by itself, the sum over places of ``sum_i corr(Z^A_i, (P Z^B)_i)``: Pearson's
    centred correlation, over examples, pixels and steps. One exact assignment solves it; heads, groups and the units
    within them are solved nested, as in weight matching. Places are the outputs of the linear, convolution and
    embedding layers (pre-activations) and the inputs of the layers that read them (after norm, nonlinearity, pooling
    or the sum of a residual stream). No other place is believed than one at which permuting the reference permutes
    what is seen there. A permutation without a place (inside recurrent layers) is found by weight matching, with
    the others settled. Dead units have similarity 0 and stay if they can.

    Parameters
    ----------
    spec : PermutationSpec
    net : nn.Module
        Of the architecture; its own weights are not used. Both models run in evaluation mode.
    reference, model : dict of str to Tensor
        State dicts of the spec's architecture; neither is changed.
    calibration : iterable of batches
        Inputs, no labels; each batch is read once and passes through both models. Memory does not depend on the
        number of batches: one batch of activations and, for each place, a matrix of its units.
    seed : int
        Of weight matching where it is needed.
    init : dict of str to Tensor, optional
        Permutations that hold where the data does not choose, instead of the identity.
    device : str, optional
        Where the models run; by default where ``reference`` is.

    Returns
    -------
    Matching
        ``objective`` is that of weight matching, so that methods can be compared; it may be lower than before.
        ``measures`` holds ``"correlation"`` and ``"correlation-before"``, means over units and places.

    Raises
    ------
    SpecMismatchError
        If a state dict, ``net`` or ``init`` does not fit the spec.
    CalibrationError
        If the data is empty, can be read only once, has a single observation, or activations are not finite.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Section 3.1; Li, Yosinski, Clune, Lipson, Hopcroft (2016),
    "Convergent learning", for correlations.

    Examples
    --------
    >>> from fedrebasin import random_perms, trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = trace(net, (torch.randn(2, 4),))
    >>> moved = permute(spec, random_perms(spec, 1), net.state_dict())
    >>> matching = activation_matching(spec, net, net.state_dict(), moved, [torch.randn(200, 4)])
    >>> bool((permute(spec, matching.perms, moved)["0.weight"] == net[0].weight).all())
    True
    """
    started = time.perf_counter()
    spec.check_state(reference, "reference")
    spec.check_state(model, "model")
    start = start_of(spec, init)
    similarity = measure_similarity(spec, net, reference, permute(spec, start, model), calibration, device=device)
    steps = _best_steps(spec, {key: found.total for key, found in similarity.items()})
    moves = {**identity_perms(spec), **steps}
    perms = compose(spec, start, moves)
    if len(steps) < len(spec.perm_shapes):
        rest = weight_matching(spec.fix(*steps), reference, permute(spec, perms, model), seed=seed, device=device)
        perms = compose(spec, perms, {**identity_perms(spec), **rest.perms})
    before = inner_product(spec, reference, model)
    objective = inner_product(spec, reference, permute(spec, perms, model))
    measures = {
        "correlation": _mean_correlation(spec, similarity.values(), moves),
        "correlation-before": _mean_correlation(spec, similarity.values(), invert(spec, start)),
    }
    seconds = time.perf_counter() - started
    return Matching(perms, objective, before, (before, objective), seconds, measures)


def _best_steps(spec: PermutationSpec, similarity: Mapping[Key, Tensor]) -> Perms:
    """The best permutation for each similarity, and for each outer one together with the families over it."""
    steps: Perms = {}
    for perm, shape in spec.perm_shapes.items():
        families = [inner for inner, outer in spec.over.items() if outer == perm and (inner, None) in similarity]
        if perm in spec.over or not (families or (perm, None) in similarity):
            continue
        score = similarity.get((perm, None), torch.zeros(shape[0], shape[0], dtype=torch.float64, device="cpu"))
        orders: dict[str, Tensor] = {}
        for family in families:
            value, orders[family] = _best_inner(similarity[family, None], spec.perm_shapes[family])
            score = score + value
        steps[perm] = outer_step = _solve(score)
        rows = torch.arange(shape[0], device="cpu")
        steps |= {family: order[rows, outer_step] for family, order in orders.items()}
    for family, outer in spec.over.items():
        keys = [(family, row) for row in range(spec.perm_shapes[family][0])]
        if outer not in spec.perm_shapes and all(key in similarity for key in keys):
            steps[family] = torch.stack([_solve(similarity[key]) for key in keys])
    return steps


def _best_inner(similarity: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The best inner assignment of every pair of outer indices: values ``(n, n)`` and orders ``(n, n, units)``."""
    count, size = shape
    pairs = similarity.view(count, size, count, size).transpose(1, 2)
    order = torch.stack([torch.stack([_solve(pair) for pair in row]) for row in pairs])
    return pairs.gather(3, order.unsqueeze(3)).squeeze(3).sum(2), order


def _solve(similarity: Tensor) -> Tensor:
    return solve_assignment(similarity + _STAY * torch.eye(len(similarity), dtype=similarity.dtype, device="cpu"))


def _mean_correlation(spec: PermutationSpec, similarity: Iterable[Similarity], perms: Mapping[str, Tensor]) -> float:
    found = [one.sum_of(spec, perms) for one in similarity]
    return sum(total for total, _ in found) / max(1, sum(count for _, count in found))
