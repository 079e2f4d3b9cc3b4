"""Weight matching by block coordinate descent (Git Re-Basin, Algorithm 1), from an anchored start."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError
from fedrebasin.matching.anchored import anchored_start
from fedrebasin.matching.descent import TOLERANCE, Descent, cost, improve
from fedrebasin.matching.plan import Block
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.matching.result import Matching
from fedrebasin.matching.rounded import start_of
from fedrebasin.seeds import generator_of
from fedrebasin.spec import PermutationSpec

#: An anchored start to whose gain its own descent adds less than this share is taken without a second start: of 39
#: pairs that a second one won, 38 were above. Where one takes long (entries of all tensors), the share is larger.
_DECIDED, _DECIDED_LARGE, _LARGE = 0.01, 0.025, 1 << 20


def weight_matching(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    seed: int = 0,
    restarts: int = 0,
    init: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Matching:
    """Permute ``model`` so that its weights are as near to ``reference`` as possible.

    Maximises ``sum_l <W_l^A, P_l W_l^B P_{l-1}^T>`` over every axis that a permutation ties: weights, biases and
    norm scales. One permutation at a time is solved exactly until no one gains. A model that no single permutation
    improves is kept as it is. Otherwise the descent begins at an *anchored* start, which visits the permutations
    from the fixed inputs and outputs inwards and looks at tensors whose other axes are settled (of the others, at
    what survives any order). If that start does not decide nearly all, the model as it is is a second start, given
    up once it cannot win; of two starts of a large network only that one goes on which is ahead after the first turn
    of the dearest permutations.

    Parameters
    ----------
    spec : PermutationSpec
    reference, model : dict of str to Tensor
        State dicts of the spec's architecture; neither is changed.
    seed : int
        Seed of the restarts' visiting orders; without restarts nothing is random.
    restarts : int
        Further descents from the model as it is, each in another random order (Algorithm 1); the best objective wins.
    init : dict of str to Tensor, optional
        Permutations to start from, and to end nowhere below; the anchored start is then left out.
    device : str, optional
        Where products are taken; by default where the tensors are.

    Returns
    -------
    Matching

    Raises
    ------
    SpecMismatchError
        If a state dict or ``init`` does not fit the spec, or a tied parameter holds a NaN or an infinity.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Algorithm 1. The anchored start is ours.

    Examples
    --------
    >>> from fedrebasin import permute, random_perms, trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> spec = trace(net, (torch.randn(2, 4),))
    >>> moved = permute(spec, random_perms(spec, 1), net.state_dict())
    >>> matching = weight_matching(spec, net.state_dict(), moved)
    >>> bool((permute(spec, matching.perms, moved)["0.weight"] == net[0].weight).all())
    True
    """
    if restarts < 0:
        raise RebasinError(f"restarts: expected 0 or more; got {restarts}")
    started = time.perf_counter()
    init = None if init is None else start_of(spec, init)
    problem = WeightProblem(spec, reference, model, init=init, device=device)
    before = problem.objective()
    found = _first_descent(problem, before, init)
    generator = generator_of(seed)
    for _ in range(restarts):
        problem.reset(init)
        places = torch.randperm(len(problem.blocks), generator=generator, device="cpu")
        order = [problem.blocks[place] for place in places.tolist()]
        found = max(found, Descent(problem, order, before).finish(), key=_objective)
    problem.reset(found.perms)
    objective = problem.objective() if len(found.history) > 1 else found.objective
    problem.reset()
    identity = before if init is None else problem.objective()
    return Matching(found.perms, objective, identity, (*found.history[:-1], objective), time.perf_counter() - started)


def _first_descent(problem: WeightProblem, before: float, init: Mapping[str, Tensor] | None) -> Descent:
    """From ``init``; or the model as it is, where nothing improves it; or the better one of the two starts."""
    if init is not None:
        return Descent(problem, problem.blocks, before).finish()
    cheapest = sorted(problem.blocks, key=lambda block: cost(problem, block))
    if not any(_swap_gains(problem, block) or improve(problem, block) > 0 for block in cheapest):
        return Descent(problem, problem.blocks, before)
    problem.reset()
    order, best = anchored_start(problem)
    start = problem.objective()
    anchored = Descent(problem, order, start, best).turn()
    large = sum(map(problem.entries_of, problem.plan.names)) >= _LARGE

    def decided() -> bool:
        return anchored.objective - start < (_DECIDED_LARGE if large else _DECIDED) * (anchored.objective - before)

    if large and not decided():
        problem.reset()
        other = Descent(problem, order, before).turn()
        if other.objective > anchored.objective:
            return other.finish()
        problem.reset(anchored.perms)
        return anchored.finish()
    if anchored.finish() and decided():
        return anchored
    problem.reset()
    return max(anchored, Descent(problem, order, before).finish(hurdle=anchored.objective), key=_objective)


def _objective(descent: Descent) -> float:
    return descent.objective


def _swap_gains(problem: WeightProblem, block: Block) -> bool:
    """True if to swap two units of an unmoved model gains: the cheap half of the question whether anything does."""
    if block in problem.plan.relative:
        return False
    similarity = problem.similarity(block)
    here = similarity.diagonal()
    gains = similarity + similarity.T - here - here.unsqueeze(1)
    return float(gains.amax()) > TOLERANCE * problem.scale(block)
