"""STE-MM: a shadow of every model is trained, and the permutations are those that come nearest to the shadows.

Index letters: p, q models.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.errors import CalibrationError
from fedrebasin.matching.labelled import LabelledNet, Loss, State
from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.merge_many import add_one_by_one, ascend, is_settled, merge_many
from fedrebasin.permute import permute
from fedrebasin.seeds import generator_of

LOGGER = logging.getLogger("fedrebasin")

_STEPS = 10
_EPOCHS = 5
#: Adam's step for each tensor, as a share of the root mean square of the model's entries.
_RATE = 0.1


def straight_through_many(problem: ManyProblem, *, seed: int = 0) -> list[float]:
    """Without data: minimise the distance of the models from their mean, under coefficients drawn at each step.

    Shadow ``S_p`` starts at the permuted model. Each step draws coefficients ``l``, uniform on the simplex, adds the
    negative gradient of ``sum_{p<q} l_p l_q |P_p M_p - P_q M_q|^2 / 2`` to the shadows as if it did not know the
    permutations, and projects: one sweep of assignments, from the last, for ``P_p = argmax_P <S_p, P M_p>``. The best
    permutations seen are where merge-many's ascent goes on from.

    The start is merge-many's (one model added at a time), and so nearly is the end: on random initialisations the
    steps add next to nothing to it. From the identity, the paper's, they and the ascent end 16% lower.

    Parameters
    ----------
    problem : ManyProblem
        At the identity; afterwards at the permutations that were found.
    seed : int
        Of the coefficients, and of the ascent's order.

    Returns
    -------
    list of float
        The objective at the identity, then whenever it is higher, never falling.

    References
    ----------
    Ito, Yamada, Kumagai (2025), "Linear mode connectivity between multiple models modulo permutation symmetries", ICML.
    """
    before = problem.objective()
    if is_settled(problem):
        return [before]
    add_one_by_one(problem, seed=seed)
    if problem.objective() < before:
        problem.put([None] * len(problem.places))
    best, history = problem.perms, [before, problem.objective()]
    generator = generator_of(seed)
    shadows = _shadows(problem)
    for _ in range(_STEPS):
        drawn = _coefficients(len(shadows), generator)
        for name in problem.plan.names:
            current = [pair.current(name) for pair in problem.pairs]
            total = torch.stack([c * tensor for c, tensor in zip(drawn, current, strict=True)]).sum(0)
            for c, tensor, shadow in zip(drawn, current, shadows, strict=True):  # what is its own does not turn it
                shadow[name] += len(shadows) ** 2 * c * (total - c * tensor)
        for place, shadow in enumerate(shadows):
            _project(problem, place, shadow)
        objective = problem.objective()
        if objective > history[-1]:
            best = problem.perms
            history.append(objective)
    problem.put(best)
    return [*history, *ascend(problem, before=before, seed=seed)[1:]]


def straight_through_many_on_data(
    problem: ManyProblem, *, net: nn.Module, batches: Iterable[Any], loss: Loss, seed: int = 0
) -> tuple[list[float], dict[str, float]]:
    """On labelled data: minimise the loss between the models, under coefficients drawn at each batch.

    As without data, but the gradient is that of the loss at ``sum_p l_p P_p M_p``, by Adam, from where merge-many ends.
    After each epoch the loss at the given coefficients is measured over all batches, and the best is kept, the start's
    included.

    Parameters
    ----------
    problem : ManyProblem
        At the identity; afterwards at the permutations that were found.
    net : nn.Module
        Of the architecture; its own weights are not used.
    batches : iterable of (input, target)
        Read twice in each of five epochs.
    loss : callable
        ``loss(output, target)``, a mean over the batch.
    seed : int

    Returns
    -------
    list of float
        The objective at the identity, at the start and at the end.
    dict
        ``"loss"`` and ``"loss-before"``, that of the start.

    Raises
    ------
    CalibrationError
        If the data is empty, can be read only once or has no targets, or the start's loss is not finite.

    References
    ----------
    As for :func:`straight_through_many`.
    """
    labelled = LabelledNet(problem.spec, net, problem.models[0], batches, loss=loss, device=problem.device)
    models = [labelled.prepared(model) for model in problem.models]
    history = merge_many(problem, seed=seed)
    history = [history[0], history[-1]]
    best, first = problem.perms, _mean_loss(problem, labelled, models)
    if not math.isfinite(first):
        raise CalibrationError(f"batches: the loss at the start is {first}; check the models, the inputs and the loss")
    if not problem.plan.names:  # nothing moves
        return history, {"loss": first, "loss-before": first}
    lowest, generator, shadows = first, generator_of(seed), _shadows(problem)
    optimizer = torch.optim.Adam(
        [{"params": [t], "lr": _RATE * float(t.square().mean().sqrt())} for shadow in shadows for t in shadow.values()]
    )
    for _ in range(_EPOCHS):
        for args, kwargs, target in labelled.batches:
            for place, shadow in enumerate(shadows):
                _project(problem, place, shadow)
            drawn = _coefficients(len(shadows), generator)
            labelled.put(_mixed(problem, models, drawn))
            finite, gradient = labelled.gradients(args, kwargs, target)
            if not finite:
                LOGGER.warning("straight-through-many: the loss became NaN or infinite; the best so far is kept")
                break
            for c, shadow in zip(drawn, shadows, strict=True):
                for name, tensor in shadow.items():
                    tensor.grad = c * gradient[name].to(tensor) if name in gradient else None
            optimizer.step()
        found = _mean_loss(problem, labelled, models)
        if found < lowest:
            best, lowest = problem.perms, found
    problem.put(best)
    return [*history, problem.objective()], {"loss": lowest, "loss-before": first}


def _shadows(problem: ManyProblem) -> list[dict[str, Tensor]]:
    return [{name: pair.current(name).clone() for name in problem.plan.names} for pair in problem.pairs]


def _coefficients(count: int, generator: torch.Generator) -> list[float]:
    """Uniform on the simplex."""
    drawn = torch.empty(count, dtype=torch.float64, device="cpu").exponential_(generator=generator)
    found: list[float] = (drawn / drawn.sum()).tolist()
    return found


def _project(problem: ManyProblem, place: int, shadow: State) -> None:
    """One sweep of assignments towards the permuted copy of a model that is nearest to its shadow."""
    if place != problem.heaviest:  # one common order is as good as another
        problem.sweep_towards(place, shadow)


def _mixed(problem: ManyProblem, models: list[dict[str, Tensor]], coefficients: list[float]) -> dict[str, Tensor]:
    moved = [permute(problem.spec, own, model) for own, model in zip(problem.perms, models, strict=True)]
    return {
        name: sum((c * other[name] for c, other in zip(coefficients, moved, strict=True)), torch.zeros_like(tensor))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in moved[problem.heaviest].items()
    }


def _mean_loss(problem: ManyProblem, labelled: LabelledNet, models: list[dict[str, Tensor]]) -> float:
    labelled.put(_mixed(problem, models, problem.coefficients))
    return labelled.mean()
