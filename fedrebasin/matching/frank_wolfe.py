"""Frank-Wolfe on the relaxed problem: all permutations move at once, through doubly stochastic matrices."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError
from fedrebasin.matching.relaxed import Relaxed, best_corner, between, corner, no_logits, soften
from fedrebasin.matching.relaxed_problem import TOLERANCE, RelaxedProblem, best_point
from fedrebasin.matching.result import Matching, inner_product
from fedrebasin.matching.rounded import best_matching, start_of
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms
from fedrebasin.permute import permute
from fedrebasin.seeds import generator_of
from fedrebasin.spec import PermutationSpec


@torch.inference_mode(False)
def frank_wolfe_matching(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    seed: int = 0,
    restarts: int = 0,
    iterations: int = 100,
    polish: bool = True,
    init: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Matching:
    """Permute ``model`` so that its weights are near to ``reference``, by steps in all permutations at once.

    Maximises ``f(P) = sum_l <W_l^A, P_l W_l^B P_{l-1}^T>``, as :func:`weight_matching` does, over doubly stochastic
    ``P``. Each step asks one assignment for each permutation, ``S = argmax_S <grad f(P), S>``, and goes to the best
    point between ``P`` and ``S``, where ``f`` is a polynomial of low degree. It starts at the centre, where all entries
    of a ``P`` are equal, and nearly always ends at permutations; if not, it is rounded by one more assignment. The
    best permutations seen are kept, those of every ``S`` and of the start included. A model that no step improves is
    kept as it is.

    Parameters
    ----------
    spec : PermutationSpec
    reference, model : dict of str to Tensor
        State dicts of the spec's architecture; neither is changed.
    seed : int
        Of the restarts; without restarts nothing is random.
    restarts : int
        Further runs, each from half-way between the centre and a random ``P``; the best objective wins.
    iterations : int
        Steps of each run at most; 10 to 30 are usual.
    polish : bool
        Whether weight matching goes on from the result, one permutation at a time.
    init : dict of str to Tensor, optional
        Permutations to start from, and to end nowhere below.
    device : str, optional
        Where products are taken; by default where the model is.

    Returns
    -------
    Matching
        ``history`` holds the best objective seen after each step, over all runs.

    Raises
    ------
    SpecMismatchError
        If a state dict or ``init`` does not fit the spec, or a tied parameter holds a NaN or an infinity.
    RebasinError
        If ``restarts`` or ``iterations`` is out of range.

    References
    ----------
    Crisostomi, Fumero, Baieri, Bernard, Rodola (2024), "C2M3: Cycle-consistent multi-model merging", for two models;
    Jaggi (2013), "Revisiting Frank-Wolfe"; Vogelstein et al. (2015), "Fast approximate quadratic programming for graph
    matching", for the starts. Keeping the best corner is ours.

    Examples
    --------
    >>> from fedrebasin import permute, random_perms, trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> spec = trace(net, (torch.randn(2, 4),))
    >>> moved = permute(spec, random_perms(spec, 1), net.state_dict())
    >>> matching = frank_wolfe_matching(spec, net.state_dict(), moved)
    >>> bool((permute(spec, matching.perms, moved)["0.weight"] == net[0].weight).all())
    True
    """
    for name, value, least in (("restarts", restarts, 0), ("iterations", iterations, 1)):
        if value < least:
            raise RebasinError(f"{name}: expected {least} or more; got {value}")
    started = time.perf_counter()
    problem = RelaxedProblem(spec, reference, model, device=device)
    start = start_of(spec, init)
    candidates = _candidates(problem, start, centred=init is None, restarts=restarts, iterations=iterations, seed=seed)
    found = best_matching(problem, reference, model, start=start, candidates=candidates, started=started)
    if not polish:
        return found
    perms = weight_matching(spec, reference, model, init=found.perms, device=device).perms
    objective = inner_product(spec, reference, permute(spec, perms, model))
    if objective <= found.objective:
        return replace(found, seconds=time.perf_counter() - started)
    history = (*found.history, objective)
    return replace(found, perms=perms, objective=objective, history=history, seconds=time.perf_counter() - started)


def _candidates(
    problem: RelaxedProblem, init: Perms, *, centred: bool, restarts: int, iterations: int, seed: int
) -> Iterator[tuple[Perms, float]]:
    """All corners that the runs come past."""
    nothing = no_logits(problem.spec, problem.like)
    first = corner(problem.spec, init, problem.like)
    _, _, slope = problem.step(first)
    centre = soften(problem.spec, nothing)
    if slope > TOLERANCE:
        yield from _ascend(problem, centre if centred else first, iterations)
    generator = generator_of(seed)
    for _ in range(restarts):
        noise = {
            perm: torch.randn(zeros.shape, generator=generator, device="cpu").to(zeros)
            for perm, zeros in nothing.items()
        }
        yield from _ascend(problem, between(centre, soften(problem.spec, noise), 0.5), iterations)


def _ascend(problem: RelaxedProblem, relaxed: Relaxed, iterations: int) -> Iterator[tuple[Perms, float]]:
    for _ in range(iterations):
        perms, value, slope = problem.step(relaxed)
        if slope <= TOLERANCE:
            break
        end = corner(problem.spec, perms, problem.like)
        coefficients = problem.polynomial(relaxed, end, slope=slope, at_start=value)
        yield perms, float(coefficients.sum())
        point = best_point(coefficients)
        if point == 0:
            break
        relaxed = between(relaxed, end, point)
    perms = best_corner(problem.spec, relaxed)
    yield perms, float(problem.value(corner(problem.spec, perms, problem.like)))
