"""Weight matching by block coordinate descent (Git Re-Basin, Algorithm 1), from an anchored start."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.assignment import best_assignment
from fedrebasin.errors import RebasinError
from fedrebasin.matching.anchored import anchored_start
from fedrebasin.matching.nested import families_over, nested_step
from fedrebasin.matching.plan import Block
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.matching.result import Matching
from fedrebasin.perms import Perms
from fedrebasin.spec import PermutationSpec

#: A step must gain this share of |reference| |model|, the two norms over the block's tensors: below it is rounding.
_TOLERANCE = 1e-7
_MAX_PASSES = 1000
#: Blocks that cost this many times as much as others wait for these.
_DEARER = 64.0
#: An anchored start to whose gain its own descent adds less than this share is taken without a second start: of 24
#: pairs that a second one won, 21 were above. Where one takes long (entries of all tensors), the share is larger.
_DECIDED, _DECIDED_LARGE, _LARGE = 0.02, 0.025, 1 << 20
#: A second start is given up once this many times what it gained since the dearest blocks' last turn would not bring it
#: level.
_HOPE = 2.0


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
    up once it cannot win.

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
        If a state dict does not fit the spec, or holds a NaN or an infinity.

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
    problem = WeightProblem(spec, reference, model, init=init, device=device)
    before = problem.objective()
    found = _first_descent(problem, before, init)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(restarts):
        problem.reset(init)
        order = [problem.blocks[index] for index in torch.randperm(len(problem.blocks), generator=generator).tolist()]
        found = max(found, _descend(problem, order, before), key=_last)
    perms, history = found
    problem.reset(perms)
    objective = problem.objective() if len(history) > 1 else history[0]
    problem.reset()
    identity = before if init is None else problem.objective()
    return Matching(perms, objective, identity, (*history[:-1], objective), time.perf_counter() - started)


_Found = tuple[Perms, list[float]]


def _last(found: _Found) -> float:
    return found[1][-1]


def _first_descent(problem: WeightProblem, before: float, init: Mapping[str, Tensor] | None) -> _Found:
    """From ``init``; or the model as it is, where nothing improves it; or the better one of the two starts."""
    if init is not None:
        return _descend(problem, problem.blocks, before)
    cheapest = sorted(problem.blocks, key=lambda block: _cost(problem, block))
    if not any(_swap_gains(problem, block) or improve(problem, block) > 0 for block in cheapest):
        return dict(problem.perms), [before]
    problem.reset()
    order, best = anchored_start(problem)
    found = _descend(problem, order, problem.objective(), best=best)
    start, end = found[1][0] - before, found[1][-1] - before
    decided = _DECIDED if sum(map(problem.entries_of, problem.plan.names)) < _LARGE else _DECIDED_LARGE
    if end - start < decided * end:
        return found
    problem.reset()
    return max(found, _descend(problem, order, before, hurdle=_last(found)), key=_last)


def _descend(
    problem: WeightProblem,
    order: Sequence[Block],
    objective: float,
    *,
    best: Collection[Block] = (),
    hurdle: float = -math.inf,
) -> _Found:
    """Improve a block after the other until nothing gains, or it seems out of reach to gain more than the ``hurdle``.

    A block is looked at only after a neighbour has moved; at first too, unless it is among those at their ``best``.
    A dear block waits until no cheaper one has anything to gain: a ResNet's first stages settle before its last one,
    which ends higher (ResNet50: by 1%) after fewer large assignments.
    """
    waiting = set(problem.blocks).difference(best)
    tiers = _tiers(problem)
    dearest = max(tiers.values(), default=0)
    history, last = [objective], objective
    while waiting and len(history) <= _MAX_PASSES:
        tier, gained = min(tiers[block] for block in waiting), 0.0
        for block in order:
            if block in waiting and tiers[block] == tier:
                waiting.discard(block)
                gain = improve(problem, block)
                if gain > 0:
                    gained += gain
                    waiting.update(problem.plan.neighbours[block])
        if gained:
            history.append(history[-1] + gained)
        if tier == dearest:
            if history[-1] + _HOPE * (history[-1] - last) < hurdle:
                break
            last = history[-1]
    return dict(problem.perms), history


def _tiers(problem: WeightProblem) -> dict[Block, int]:
    """0 for blocks that cost less than ``_DEARER`` times the cheapest one, 1 for those up to its square, and so on."""
    costs = {block: _cost(problem, block) for block in problem.blocks}
    least = min(costs.values(), default=1)
    return {block: int(math.log(cost / least, _DEARER)) for block, cost in costs.items()}


def _cost(problem: WeightProblem, block: Block) -> int:
    """About what a look at a block costs: its products, and an assignment."""
    return block.size * (sum(problem.entries(block)) + 20 * block.size**2)


def _swap_gains(problem: WeightProblem, block: Block) -> bool:
    """True if to swap two units of an unmoved model gains: the cheap half of the question whether anything does."""
    if block in problem.plan.relative:
        return False
    similarity = problem.similarity(block)
    here = similarity.diagonal()
    gains = similarity + similarity.T - here - here.unsqueeze(1)
    return float(gains.amax()) > _TOLERANCE * problem.scale(block)


def improve(problem: WeightProblem, block: Block) -> float:
    """Move the block's units to where they gain most; returns the gain, 0 if nothing moved."""
    if families_over(problem, block.perm):
        return _move_if_better(problem, nested_step(problem, block), problem.scale(block))
    similarity = problem.similarity(block)
    current = torch.arange(block.size) if block in problem.plan.relative else problem.perms[block.perm]
    new = best_assignment(similarity, current)
    if new is current:
        return 0.0
    after, before = similarity.gather(1, torch.stack([new, current], 1)).sum(0, dtype=torch.float64).tolist()
    gain: float = after - before
    if gain <= _TOLERANCE * problem.scale(block):
        return 0.0
    if block in problem.plan.quadratic:
        return _move_if_better(problem, problem.steps(block, new), problem.scale(block))
    if block in problem.plan.relative:
        problem.move(problem.steps(block, new))
    else:
        problem.put({block.perm: new}, [block.perm])
    return gain


def _move_if_better(problem: WeightProblem, steps: Perms, scale: float) -> float:
    """Move units by steps that are not sure to gain, and back again if they do not; returns the gain."""
    names = problem.names_of(steps)
    perms = {perm: problem.perms[perm] for perm in steps}
    before = problem.objective(names)
    problem.move(steps)
    gain = problem.objective(names) - before
    if gain > _TOLERANCE * scale:
        return gain
    problem.put(perms, perms)
    return 0.0
