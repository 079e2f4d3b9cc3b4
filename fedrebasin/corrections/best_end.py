"""best_end: no merge, but one end's network with its last layer solved for what all ends say."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.least_squares import held_out_rows, steps_of
from fedrebasin.corrections.normal_equations import NormalEquations
from fedrebasin.corrections.output_goals import check_goals, check_last_layer, goals_of
from fedrebasin.corrections.passes import Memory, Runner
from fedrebasin.corrections.solution import check_finite, choose_ridge, solve_layer
from fedrebasin.corrections.working import begin, extract, working_copy
from fedrebasin.errors import RebasinError

LOGGER = logging.getLogger("fedrebasin")


@torch.no_grad()
def best_end(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    ridge: float | None = None,
    goals: str = "pre-activations",
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Keep one end's network as it is, and solve its last layer alone for the outputs of the ends' ensemble.

    The end is the one whose solved layer comes nearest, in mean square, on every fifth example after a fit on the
    others; it is then solved on all. Closed form, no labels, no alignment. Nothing of the merge is used: what a merge
    has to be better than, and a candidate for ``select="calibration"`` where its hidden layers are worth less than one
    end's.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    merged : dict of str to Tensor
        Says which keys, dtypes and devices the result has.
    ends : sequence of dict of str to Tensor
    calibration : iterable of batches
        Inputs, no labels. Along the first axis lie examples.
    coefficients : sequence of float, optional
        The ensemble's; equal by default. An end whose coefficient is 0 takes no part.
    ridge : float, optional
        As in :func:`fedrebasin.least_squares`.
    goals : {"pre-activations", "probabilities"}
        The average of the ends' outputs, or the logits of the average of their class probabilities.
    device : str, optional
        Where the networks run; by default where ``merged`` is.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``merged``.

    Raises
    ------
    CalibrationError
        If the data is empty, or activations are not finite.
    RebasinError
        If coefficients do not fit, ``ridge`` is negative, ``goals`` is unknown, or the network does not end in a linear
        layer of shape (examples, outputs).

    References
    ----------
    Ours, as a baseline; of retraining last layers: Kirichenko, Izmailov, Wilson (2023), arXiv 2204.02937.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> one, other = net.state_dict(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict()
    >>> found = best_end(net, one, [one, other], [torch.randn(200, 4)])
    >>> any(torch.equal(found["0.weight"], end["0.weight"]) for end in (one, other))
    True
    """
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise RebasinError(f"ridge: expected None or a number from 0; got {ridge}")
    model, batches, weights = begin(net, merged, ends, calibration, coefficients, device)
    steps = steps_of(model, batches, "best end")
    check_goals(goals)
    last = check_last_layer("best_end", model, steps, batches)
    shares = [weight for weight in weights if weight]
    models = [working_copy(net, end, device) for end, weight in zip(ends, weights, strict=True) if weight]
    runners = [Runner(one, steps, Memory(0), keep=False) for one in models]
    sums = [(NormalEquations(), NormalEquations()) for _ in models]
    lacks = [0.0] * len(models)
    seen = 0
    for number, (args, kwargs, _) in enumerate(batches):
        said = [one.output(len(steps) - 1, number, (args, kwargs)) for one in runners]
        goal = goals_of(goals, said, shares)
        held = held_out_rows(seen, goal)
        seen += len(goal)
        for place, (runner, (fit, check)) in enumerate(zip(runners, sums, strict=True)):
            lacking = goal - said[place]
            fit.add(runner.last_input[~held].T, lacking[~held].T)
            check.add(runner.last_input[held].T, lacking[held].T)
            lacks[place] += float(lacking[held].double().square().sum())
    errors = [
        lack / max(1, check.count) + _excess(last, fit, check, ridge)
        for (fit, check), lack in zip(sums, lacks, strict=True)
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    LOGGER.info("best end: %d of %d; mean squared errors %s", best, len(errors), ", ".join(f"{e:.4g}" for e in errors))
    solve_layer(models[best], last, *sums[best], ridge)
    return extract(models[best], merged)


def _excess(layer: Layer, fit: NormalEquations, check: NormalEquations, ridge: float | None) -> float:
    check_finite(layer, fit)
    check_finite(layer, check)
    intercept = layer.bias is not None
    chosen = choose_ridge(fit, check, intercept=intercept) if ridge is None else ridge
    return check.excess(*fit.solve(chosen, intercept=intercept))
