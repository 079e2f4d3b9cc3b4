"""Stars: every model is matched to one of them, the heaviest or the medoid."""

from __future__ import annotations

from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.result import Matching
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms, invert


def star(problem: ManyProblem, *, seed: int = 0) -> list[float]:
    """Match every model to the heaviest one, as Git Re-Basin's Algorithm 1 matches a pair.

    Only the pairs with the centre are looked at, so that the objective of all pairs may be lower than before.

    Parameters
    ----------
    problem : ManyProblem
        At the identity; afterwards at the permutations that were found.
    seed : int
        As for :func:`fedrebasin.weight_matching`.

    Returns
    -------
    list of float
        The objective of all pairs before and after.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Algorithm 1, for each pair.
    """
    centre = problem.heaviest
    found = [None if place == centre else _pair(problem, centre, place, seed).perms for place in problem.places]
    return _put(problem, found)


def medoid(problem: ManyProblem, *, seed: int = 0) -> list[float]:
    """Match every model to the one whose matching objectives with the others sum to most.

    All ``N (N - 1) / 2`` pairs are matched. The objective of model p with q counts ``c_q`` times, and of equal sums
    the first is taken.

    Parameters
    ----------
    problem, seed
        As for :func:`star`.

    Returns
    -------
    list of float
        The objective of all pairs before and after.

    References
    ----------
    Kaufman, Rousseeuw (1987), "Clustering by means of medoids"; the similarity is Git Re-Basin's objective.
    """
    pairs: dict[tuple[int, int], Matching] = {}
    sums = [0.0 for _ in problem.places]
    for p in problem.places:
        for q in range(p):
            pairs[p, q] = _pair(problem, p, q, seed)
            sums[p] += problem.coefficients[q] * pairs[p, q].objective
            sums[q] += problem.coefficients[p] * pairs[p, q].objective
    centre = sums.index(max(sums))
    above = [invert(problem.spec, pairs[q, centre].perms) for q in range(centre + 1, len(sums))]
    return _put(problem, [*(pairs[centre, q].perms for q in range(centre)), None, *above])


def _pair(problem: ManyProblem, centre: int, place: int, seed: int) -> Matching:
    models = problem.models
    return weight_matching(problem.spec, models[centre], models[place], seed=seed, device=problem.device)


def _put(problem: ManyProblem, perms: list[Perms | None]) -> list[float]:
    before = problem.objective()
    problem.put(perms)
    return [before, problem.objective()]
