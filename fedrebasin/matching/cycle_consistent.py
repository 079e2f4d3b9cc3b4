"""C2M3: Frank-Wolfe in the permutations of all models at once, each into one common order, and an ascent at the end."""

from __future__ import annotations

from collections.abc import Iterator

from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.merge_many import add_one_by_one, ascend, is_settled
from fedrebasin.matching.relaxed import best_corner, corner, no_logits, soften
from fedrebasin.matching.relaxed_many import RelaxedMany, on_the_way
from fedrebasin.matching.relaxed_problem import TOLERANCE, best_point
from fedrebasin.perms import Perms, identity_perms

_STEPS = 50


def cycle_consistent(problem: ManyProblem, *, seed: int = 0) -> list[float]:
    """Raise the objective over doubly stochastic matrices, one for each model and permutation.

    The permutation from p to q is ``P_p P_q^T``, by way of a common order (the *universe*), so that any cycle closes.
    Each step asks one assignment for each model and permutation, and goes to the best point on the line to them all,
    where the objective is a polynomial. The best of all permutations seen is where merge-many's ascent goes on from.

    Two things are ours. The heaviest model is kept still, as the objective does not know one common order from another.
    And Frank-Wolfe starts half-way between the centre, where all entries of a ``P`` are equal, and merge-many's start:
    five random initialisations of a wide MLP gained about an eighth less from the centre alone, and a seventh less from
    the identity, which the paper starts from (``simulations/bench/many.py`` has it beside merge-many).

    Parameters
    ----------
    problem : ManyProblem
        At the identity; afterwards at the permutations that were found.
    seed : int
        Of the ascent's order.

    Returns
    -------
    list of float
        The objective at the identity, then whenever it is higher, never falling.

    References
    ----------
    Crisostomi, Fumero, Baieri, Bernard, Rodola (2024), "C2M3: Cycle-consistent multi-model merging", NeurIPS.
    """
    before = problem.objective()
    if is_settled(problem):
        return [before]
    problem.put([None] * len(problem.places))
    best, history = problem.perms, [before]
    for perms in _seen(problem, seed):
        problem.put(perms)
        objective = problem.objective()
        if objective > history[-1]:
            best = perms
            history.append(objective)
    problem.put(best)
    return [*history, *ascend(problem, before=before, seed=seed)[1:]]


def _seen(problem: ManyProblem, seed: int) -> Iterator[list[Perms]]:
    """Merge-many's start, the permutations that every step goes towards, and those nearest to where the steps end."""
    spec, relaxed, still = problem.spec, RelaxedMany(problem), problem.heaviest
    add_one_by_one(problem, seed=seed)
    start = problem.perms
    yield start
    centre = soften(spec, no_logits(spec, relaxed.like))
    corners = [corner(spec, own, relaxed.like) for own in start]
    at = on_the_way(corners, [corners[place] if place == still else centre for place in problem.places], 0.5)
    for _ in range(_STEPS):
        value, gradient = relaxed.gradient(at)
        perms = [
            identity_perms(spec) if place == still else best_corner(spec, gradient[place]) for place in problem.places
        ]
        end = [corner(spec, own, relaxed.like) for own in perms]
        slope = sum(
            float((slopes[perm] * (last[perm] - first)).sum())
            for slopes, last, own in zip(gradient, end, at, strict=True)
            for perm, first in own.items()
        )
        yield perms
        if slope <= TOLERANCE:
            break
        point = best_point(relaxed.polynomial(at, end, slope=slope, at_start=value))
        if point == 0:
            break
        at = on_the_way(at, end, point)
    yield [identity_perms(spec) if place == still else best_corner(spec, own) for place, own in enumerate(at)]
