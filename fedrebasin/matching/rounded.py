"""From relaxed to exact: the best of all permutations that a relaxed method has come past."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from torch import Tensor

from fedrebasin.matching.relaxed import corner
from fedrebasin.matching.relaxed_problem import RelaxedProblem
from fedrebasin.matching.result import Matching, inner_product
from fedrebasin.perms import Perms, checked_perms, identity_perms
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec


def start_of(spec: PermutationSpec, init: Mapping[str, Tensor] | None) -> Perms:
    """``init``, checked, or the identity."""
    return identity_perms(spec) if init is None else checked_perms(spec, init)


def best_matching(
    problem: RelaxedProblem,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    start: Perms,
    candidates: Iterable[tuple[Perms, float]],
    started: float,
) -> Matching:
    """The best candidate, or ``start`` if none is better.

    Candidates come with their value in the problem's units and precision, which decide among them; the winner is
    then measured in float64 against ``start``.
    """
    spec = problem.spec
    best = start
    values = [float(problem.value(corner(spec, start, problem.like)))]
    for perms, value in candidates:
        if value > values[-1]:
            best = perms
        values.append(max(value, values[-1]))
    before = inner_product(spec, reference, model)
    at_start, objective = (inner_product(spec, reference, permute(spec, perms, model)) for perms in (start, best))
    if objective <= at_start:
        best, objective, values = start, at_start, values[:1]
    between = (min(max(value * problem.scale, at_start), objective) for value in values[1:-1])
    history = (at_start, *between, objective)
    return Matching(best, objective, before, history, time.perf_counter() - started)
