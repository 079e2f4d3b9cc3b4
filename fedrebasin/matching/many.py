"""Many models without a reference: the methods by name, and what is common to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.coefficients import check_coefficients
from fedrebasin.errors import RebasinError
from fedrebasin.matching.cycle_consistent import cycle_consistent
from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.merge_many import merge_many
from fedrebasin.matching.result import ManyMatching
from fedrebasin.matching.star import medoid, star
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms, compose, invert
from fedrebasin.spec import PermutationSpec

#: Each moves the problem to what it finds, and returns the objective on its way there.
JOINT_METHODS: dict[str, Callable[..., list[float]]] = {
    "merge-many": merge_many,
    "cycle-consistent": cycle_consistent,
    "star": star,
    "medoid": medoid,
}


def match_many(
    spec: PermutationSpec,
    models: Sequence[Mapping[str, Tensor]],
    *,
    coefficients: Sequence[float] | None = None,
    method: str = "merge-many",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ManyMatching:
    """Find one permutation dict for each model so that all share one order of units.

    The objective is ``sum_{p<q} c_p c_q <P_p M_p, P_q M_q>`` over the tied parameters. The permutation from one model
    to another is by way of the common order, so that those around any cycle compose to the identity.

    Parameters
    ----------
    spec : PermutationSpec
    models : sequence of dict of str to Tensor
        State dicts of the spec's architecture; none is changed.
    coefficients : sequence of float, optional
        Averaging weights, scaled to sum 1; equal by default. The heaviest model keeps its order. One of weight zero
        has no say, and is matched to the sum of the others in the end.
    method : {"merge-many", "cycle-consistent", "star", "medoid"}
        ``"merge-many"`` raises the objective block by block; ``"cycle-consistent"`` all permutations at once, by
        Frank-Wolfe, which takes ten times as long and finds a little more; ``"star"`` matches every model to the
        heaviest; ``"medoid"`` to the one that is most like all others once they are matched.
    seed : int
        Seed of the visiting order.
    device : str, optional
        Where products are taken; by default where the tensors are.

    Returns
    -------
    ManyMatching

    Raises
    ------
    RebasinError
        If the method is unknown, or coefficients do not fit.
    SpecMismatchError
        If a state dict does not fit the spec, or holds a NaN or an infinity.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Algorithm 3; each method's file names its own.

    Examples
    --------
    >>> from fedrebasin import permute, random_perms, trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> spec, state = trace(net, (torch.randn(2, 4),)), net.state_dict()
    >>> copies = [permute(spec, random_perms(spec, seed), state) for seed in range(3)]
    >>> found = match_many(spec, copies)
    >>> aligned = [permute(spec, perms, copy)["0.weight"] for perms, copy in zip(found.perms, copies)]
    >>> bool((aligned[0] == aligned[1]).all() and (aligned[0] == aligned[2]).all())
    True
    """
    if method not in JOINT_METHODS:
        raise RebasinError(f"method: expected one of {', '.join(JOINT_METHODS)}; got {method!r}")
    started = time.perf_counter()
    weights = check_coefficients(coefficients, len(models))
    counted = [place for place, weight in enumerate(weights) if weight > 0]
    problem = ManyProblem(
        spec,
        [models[place] for place in counted],
        [weights[place] for place in counted],
        labels=[f"models[{place}]" for place in counted],
        device=device,
    )
    history = JOINT_METHODS[method](problem, seed=seed)
    frame = invert(spec, problem.perms[problem.heaviest])
    found = dict(zip(counted, problem.perms, strict=True))
    for place, model in enumerate(models):
        if place not in found:
            found[place] = weight_matching(spec, problem.as_state(), model, seed=seed, device=device).perms
    perms: list[Perms] = [compose(spec, found[place], frame) for place in range(len(models))]
    return ManyMatching(perms, history[-1], history[0], tuple(history), time.perf_counter() - started)
