"""Merge-many: block coordinate ascent on the objective of all pairs, from a start that adds one model at a time."""

from __future__ import annotations

import math

import torch

from fedrebasin.matching.descent import out_of_reach
from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.plan import Block
from fedrebasin.matching.star import star
from fedrebasin.matching.weight import weight_matching
from fedrebasin.seeds import generator_of

#: An ascent ends with a sweep that adds less than this share of what has been gained since the identity.
_ENOUGH = 1e-4
_MAX_SWEEPS = 100


def merge_many(problem: ManyProblem, *, seed: int = 0) -> list[float]:
    """Align every model to the weighted sum of the others, one permutation at a time, until that gains no more.

    Algorithm 3 of Git Re-Basin aligns a whole model before it looks at the next; here a sweep visits the
    permutations one after the other, and in each the models in random order. What decides the objective is the start,
    which is ours: the heaviest model, then the others by weight, each matched as a whole to the sum of those before.
    Five random initialisations of a wide MLP gain a tenth more from it than from a star around any of them, and a fifth
    more than from the identity, in whichever order they are added (``simulations/bench/many.py``). On trained networks
    a star is as good and sometimes a little better: it is the second start, given up once it cannot win.

    Models that no single permutation improves stay as they are; and if the ascent from the start ends below them, it
    starts from them as they are.

    Parameters
    ----------
    problem : ManyProblem
        At the identity; afterwards at the permutations that were found.
    seed : int
        Of the order in which models are visited.

    Returns
    -------
    list of float
        The objective at the identity, then after the start and after each sweep where it is higher.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin: Merging models modulo permutation symmetries", Algorithm 3.
    """
    before = problem.objective()
    if is_settled(problem):
        return [before]
    add_one_by_one(problem, seed=seed)
    history = ascend(problem, before=before, seed=seed)
    if len(problem.places) > 2:  # of two models both starts are the same
        best = problem.perms
        star(problem, seed=seed)
        second = ascend(problem, before=before, seed=seed, hurdle=history[-1])
        if second[-1] > history[-1]:
            history = second
        else:
            problem.put(best)
    if history[-1] < before:
        problem.put([None] * len(problem.pairs))
        history = ascend(problem, before=before, seed=seed)
    return [before, *(value for value in history if value > before)]


def is_settled(problem: ManyProblem) -> bool:
    """True if no single permutation of any model gains; otherwise the first that does has moved."""
    cells = ((place, block) for block in problem.blocks for place in problem.places)
    return not any(problem.improve(place, block) > 0 for place, block in cells)


def add_one_by_one(problem: ManyProblem, *, seed: int = 0) -> None:
    """Match each model as a whole to the sum of the heavier ones, which were matched before it."""
    order = sorted(problem.places, key=lambda place: -problem.coefficients[place])
    problem.put([None] * len(order))
    for count, place in enumerate(order[1:], 1):
        problem.gather(order[:count])
        found = weight_matching(
            problem.spec, problem.as_state(), problem.models[place], seed=seed, device=problem.device
        )
        problem.pairs[place].reset(found.perms)
    problem.gather(problem.places)


def ascend(problem: ManyProblem, *, before: float, seed: int = 0, hurdle: float = -math.inf) -> list[float]:
    """Sweep over permutations and models until a sweep gains nothing, or next to nothing of what exceeds ``before``.

    It also ends where it seems out of reach to gain more than the ``hurdle``.

    A permutation of a model is looked at only after something has moved that its similarity depends on.
    Returns the objective at the start and after each sweep, never falling.
    """
    generator = generator_of(seed)
    waiting = {(place, block) for place in problem.places for block in problem.blocks}
    history = [problem.objective()]
    for _ in range(_MAX_SWEEPS):
        gained = 0.0
        for block in problem.blocks:
            for place in torch.randperm(len(problem.places), generator=generator, device="cpu").tolist():
                if (place, block) in waiting:
                    waiting.discard((place, block))
                    gain = problem.improve(place, block)
                    if gain > 0:
                        gained += gain
                        waiting |= _disturbed(problem, place, block)
        if not gained:
            break
        problem.gather(problem.places)
        history.append(max(problem.objective(), history[-1]))
        if gained < _ENOUGH * (history[-1] - before) or out_of_reach(hurdle, history[-1], gained, before):
            break
    return history


def _disturbed(problem: ManyProblem, place: int, block: Block) -> set[tuple[int, Block]]:
    around = problem.plan.neighbours[block]
    return {(other, near) for other in problem.places for near in around} | {
        (other, block) for other in problem.places if other != place
    }
