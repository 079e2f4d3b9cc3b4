"""Matching that may leave units out: a pair that is not alike enough is no pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.problem import WidthProblem

_TOLERANCE = 1e-9


def match_some(
    reference_spec: PermutationSpec,
    model_spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    threshold: float,
) -> dict[str, Tensor]:
    """Find which units of ``model`` are which of ``reference`` by what writes them, and which are like none.

    A pair (i, j) is worth ``<a_i, b_j> - (1 - threshold) / 2 * (|a_i|^2 + |b_j|^2)``, which is positive where the
    squared distance is below ``threshold * (|a_i|^2 + |b_j|^2)``; only such pairs are made, so that the sum is largest.
    One permutation after the other, in forward order: what a unit reads is in the reference's order by then, and zero
    where the other network has no such unit. On a residual stream, what reads units of later layers is left out.

    Returns
    -------
    dict of str to Tensor, shape (units of the reference, units of the model), float64
        By the reference's names of the permutations: 1 for a pair, else 0.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> spec, state = trace(net, (torch.randn(2, 1),)), net.state_dict()
    >>> match_some(spec, spec, state, {**state, "0.weight": -state["0.weight"], "0.bias": -state["0.bias"]},
    ...            threshold=0.01)["0"].trace()
    tensor(0., dtype=torch.float64)
    """
    problem = WidthProblem(reference_spec, model_spec, reference, model)
    turned = WidthProblem(model_spec, reference_spec, model, reference)  # measures the model's units in their own order
    for perm in problem.forward(reads=False):
        mine, theirs = _lengths(problem, perm), _lengths(turned, problem.names[perm])
        gains = problem.similarity(perm)[0] - (1 - threshold) / 2 * (mine.unsqueeze(1) + theirs)
        pairs = _assign(gains)
        problem.writes[perm] = problem.reads[perm] = pairs
        turned.writes[problem.names[perm]] = turned.reads[problem.names[perm]] = pairs.T
    return problem.writes


def _lengths(problem: WidthProblem, perm: str) -> Tensor:
    """Squared length of what writes each unit of the problem's reference, over what can be compared by now."""
    total = torch.zeros(problem.sizes(perm)[0], dtype=torch.float64, device="cpu")
    for own, _ in problem.rows(perm, reads=False):
        total += own.square().sum(1)
    return total


def _assign(gains: Tensor) -> Tensor:
    """The pairs of positive gain whose sum is largest; what is zero but for rounding is no gain."""
    rows, columns = linear_sum_assignment(gains.clamp_min(0).numpy(), maximize=True)
    matrix = torch.zeros_like(gains)
    matrix[rows, columns] = (gains[rows, columns] > _TOLERANCE * gains.abs().max()).to(gains)
    return matrix
