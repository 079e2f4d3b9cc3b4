"""Many models without a reference: the methods by name, and what is common to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.coefficients import check_coefficients
from fedrebasin.errors import RebasinError
from fedrebasin.matching.cycle_consistent import cycle_consistent
from fedrebasin.matching.labelled import Loss
from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.merge_many import merge_many
from fedrebasin.matching.result import ManyMatching
from fedrebasin.matching.star import medoid, star
from fedrebasin.matching.straight_through_many import straight_through_many, straight_through_many_on_data
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms, compose, invert
from fedrebasin.spec import PermutationSpec

#: The method that learns from labelled data, if it is given a loss.
ON_DATA = "straight-through-many"
#: Each moves the problem to what it finds, and returns the objective on its way there.
MANY_METHODS: dict[str, Callable[..., list[float]]] = {
    "merge-many": merge_many,
    "cycle-consistent": cycle_consistent,
    ON_DATA: straight_through_many,
    "star": star,
    "medoid": medoid,
}


@torch.inference_mode(False)
def match_many(
    spec: PermutationSpec,
    models: Sequence[Mapping[str, Tensor]],
    *,
    coefficients: Sequence[float] | None = None,
    method: str = "merge-many",
    net: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
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
    method : {"merge-many", "cycle-consistent", "straight-through-many", "star", "medoid"}
        ``"merge-many"`` raises the objective block by block; ``"cycle-consistent"`` all permutations at once, by
        Frank-Wolfe, which takes ten times as long and finds a little more; ``"straight-through-many"`` trains shadows
        of the models, towards each other, or for a low loss on data; ``"star"`` matches every model to the heaviest;
        ``"medoid"`` to the one that is most like all others once they are matched.
    net, batches, loss : optional, for ``"straight-through-many"`` only, all or none
        A module of the architecture, (input, target) batches that can be read again, and ``loss(output, target)``.
    seed : int
        Seed of the visiting order.
    device : str, optional
        Where products are taken; by default where the first model is.

    Returns
    -------
    ManyMatching

    Raises
    ------
    RebasinError
        If the method is unknown, has no use for data or not all of it, or coefficients do not fit.
    SpecMismatchError
        If a state dict does not fit the spec, or a tied parameter holds a NaN or an infinity.

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
    if method not in MANY_METHODS:
        raise RebasinError(f"method: expected one of {', '.join(MANY_METHODS)}; got {method!r}")
    given = {"net": net, "batches": batches, "loss": loss}
    lacking = [name for name, value in given.items() if value is None]
    if len(lacking) < len(given) and (lacking or method != ON_DATA):
        raise RebasinError(
            f"{', '.join(given)}: expected all of them or none, and with method={ON_DATA!r} only; got method={method!r}"
            + (f" without {' and '.join(lacking)}" if lacking else "")
        )
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
    measures: dict[str, float] = {}
    if net is not None and batches is not None and loss is not None:
        history, measures = straight_through_many_on_data(problem, net=net, batches=batches, loss=loss, seed=seed)
    else:
        history = MANY_METHODS[method](problem, seed=seed)
    frame = invert(spec, problem.perms[problem.heaviest])
    found = dict(zip(counted, problem.perms, strict=True))
    for place, model in enumerate(models):
        if place not in found:
            found[place] = weight_matching(spec, problem.as_state(), model, seed=seed, device=device).perms
    perms: list[Perms] = [compose(spec, found[place], frame) for place in range(len(models))]
    return ManyMatching(perms, history[-1], history[0], tuple(history), time.perf_counter() - started, measures)
