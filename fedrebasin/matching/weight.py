"""Weight matching by block coordinate descent (Git Re-Basin, Algorithm 1), from two deterministic starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedrebasin.assignment import solve_assignment
from fedrebasin.errors import RebasinError
from fedrebasin.layout import Free, leaves
from fedrebasin.matching.nested import families_over, nested_step
from fedrebasin.matching.problem import Block, WeightProblem
from fedrebasin.matching.result import Matching
from fedrebasin.perms import Perms, random_perms
from fedrebasin.spec import PermutationSpec

#: A step must gain this share of |reference| |model|, the two norms over the block's tensors: below it is rounding.
_TOLERANCE = 1e-7
_MAX_SWEEPS = 100


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
    norm scales. One permutation at a time is solved exactly, in random order, until no one gains. Two starts
    are tried and the better one kept: the model as it is, and an *anchored* start, which visits the permutations
    from the fixed inputs and outputs inwards and looks only at tensors whose other axes are settled. If the
    model as it is cannot be improved by any single permutation, it is kept and nothing else is tried.

    Parameters
    ----------
    spec : PermutationSpec
    reference, model : dict of str to Tensor
        State dicts of the spec's architecture; neither is changed.
    seed : int
        Seed of the visiting order and of the restarts.
    restarts : int
        Further starts from random permutations; the best objective wins.
    init : dict of str to Tensor, optional
        Permutations to start from, instead of the identity.
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
    generator = torch.Generator().manual_seed(seed)
    problem = WeightProblem(spec, reference, model, init=init, device=device)
    before = problem.objective()
    best, history = _descend(problem, generator)
    starts: list[Callable[[], None]] = []
    if len(history) > 1:  # something moved
        starts.append(lambda: _anchored_start(problem))
        starts += [lambda: problem.reset(random_perms(spec, generator))] * restarts
    for start in starts:
        start()
        perms, objectives = _descend(problem, generator)
        if objectives[-1] > history[-1] + _TOLERANCE * abs(history[-1]):
            best, history = perms, objectives
    identity_objective = before if init is None else _objective_of_identity(problem)
    return Matching(best, history[-1], identity_objective, tuple(history), time.perf_counter() - started)


def _objective_of_identity(problem: WeightProblem) -> float:
    problem.reset()
    return problem.objective()


def _descend(problem: WeightProblem, generator: torch.Generator) -> tuple[Perms, list[float]]:
    """Sweep until nothing gains; a block is looked at again only after a neighbour has moved."""
    neighbours = _neighbours(problem)
    waiting = set(problem.blocks)
    history = [problem.objective()]
    for _ in range(_MAX_SWEEPS):
        order = torch.randperm(len(problem.blocks), generator=generator).tolist()
        moved = False
        for block in [problem.blocks[index] for index in order]:
            if block in waiting:
                waiting.discard(block)
                if _improve(problem, block):
                    waiting |= neighbours[block]
                    moved = True
        if not moved:
            break
        history.append(problem.objective())
    return dict(problem.perms), history


def _improve(problem: WeightProblem, block: Block) -> bool:
    threshold = _TOLERANCE * problem.scales[block]
    if families_over(problem, block.perm):
        return _move_if_better(problem, nested_step(problem, block), threshold)
    similarity = problem.similarity(block)
    step = solve_assignment(similarity)
    units = torch.arange(block.size)
    gain = float((similarity[units, step] - similarity.diagonal()).sum())
    if gain <= threshold:
        return False
    if problem.is_quadratic(block):
        return _move_if_better(problem, problem.steps(block, step), threshold)
    problem.move(problem.steps(block, step))
    return True


def _move_if_better(problem: WeightProblem, steps: Perms, threshold: float) -> bool:
    """Move units by steps that are not sure to gain, and back again if they do not."""
    names = problem.names_of(steps)
    before, state, perms = problem.objective(names), dict(problem.current), problem.perms
    problem.move(steps)
    if problem.objective(names) > before + threshold:
        return True
    problem.current, problem.perms = state, perms
    return False


def _neighbours(problem: WeightProblem) -> dict[Block, set[Block]]:
    using: dict[str, set[Block]] = {}
    for block in problem.blocks:
        for name in problem.tensors(block):
            using.setdefault(name, set()).add(block)
    return {
        block: {other for name in problem.tensors(block) for other in using[name]}
        - (set() if problem.is_quadratic(block) else {block})
        for block in problem.blocks
    }


def _anchored_start(problem: WeightProblem) -> None:
    """Settle the permutations one after the other, each by the tensors whose other axes are settled already.

    The one with the most settled entries for each of its units comes first. A planted permutation is found
    in this way whatever the depth, where descent from the identity stops in poor optima of residual networks.
    """
    problem.reset()
    perms_of = {
        name: {leaf.perm for layout in problem.spec.axes[name] for leaf in leaves(layout) if isinstance(leaf, Free)}
        for name in problem.names
    }
    clusters: dict[str, list[Block]] = {}
    for block in problem.blocks:
        clusters.setdefault(problem.spec.over.get(block.perm, block.perm), []).append(block)
    unsettled = dict(clusters)
    while unsettled:
        open_perms = {block.perm for group in unsettled.values() for block in group}
        known = {
            perm: {
                name
                for block in group
                for name in problem.tensors(block)
                if perms_of[name] & open_perms <= {block.perm for block in group}
            }
            for perm, group in unsettled.items()
        }
        evidence = {perm: _evidence(problem, group, known[perm], perms_of) for perm, group in unsettled.items()}
        chosen = max(unsettled, key=lambda perm: evidence[perm])
        group = unsettled.pop(chosen)
        if evidence[chosen] > 0:
            _settle(problem, group, known[chosen])


def _evidence(problem: WeightProblem, group: list[Block], names: set[str], perms_of: dict[str, set[str]]) -> float:
    """Settled entries for each unit; a tensor that has two of the group's families says nothing before one is known."""
    families = {block.perm for block in group if block.row is not None}
    entries = sum(problem.reference[name].numel() for name in names if len(perms_of[name] & families) < 2)
    return entries / sum(block.size for block in group)


def _settle(problem: WeightProblem, group: list[Block], names: set[str]) -> None:
    """Move a permutation, and the families over it, to where the tensors ``names`` want them."""
    outer = next((block for block in group if families_over(problem, block.perm)), None)
    if outer is not None:
        problem.move(nested_step(problem, outer, names))
    for block in group:
        if block is not outer:
            step = solve_assignment(problem.similarity(block, names))
            if not torch.equal(step, torch.arange(block.size)):
                problem.move(problem.steps(block, step))
