"""best_end: no merge, but one end's network with its last layer solved for what all ends say."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.coefficients import single
from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.least_squares import held_out_rows, steps_of
from fedrebasin.corrections.normal_equations import NormalEquations, gram_product
from fedrebasin.corrections.output_goals import check_goals, check_last_layer, goals_of
from fedrebasin.corrections.passes import Memory, Runner
from fedrebasin.corrections.solution import check_finite, check_ridge, choose_ridge, solve_layer
from fedrebasin.corrections.working import begin, extract, warn_of_few, working_copy

LOGGER = logging.getLogger("fedrebasin")


@torch.inference_mode(False)
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

    The end is the one that, solved on the other examples, comes nearest to the average of the ends' outputs on every
    fifth one, in mean square; it is then solved for the goals, on all. Closed form, no labels, no alignment. Nothing of
    the merge is used: it is what a merge has to be better than, and a candidate for ``select="calibration"`` where
    hidden layers that were averaged are worth less than one end's.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    merged : dict of str to Tensor
        Says which keys, dtypes and devices the result has.
    ends : sequence of dict of str to Tensor
    calibration : iterable of batches
        Inputs, no labels. Along the first axis lie examples. Shuffle data whose classes come in turn: every fifth
        example is held out, which would be one or two classes alone.
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

    Warns
    -----
    UserWarning
        If there are fewer than 100 examples.

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
    check_ridge(ridge)
    model, batches, weights = begin(net, merged, ends, calibration, coefficients, device)
    steps = steps_of(model, batches, "best end")
    check_goals(goals)
    last = check_last_layer("best_end", model, steps, batches)
    shares = [weight for weight in weights if weight]
    models = [working_copy(net, end, batches.device) for end, weight in zip(ends, weights, strict=True) if weight]
    same = goals == "pre-activations"
    candidates = [_Candidate(Runner(one, steps, Memory(0), keep=False), alike=same) for one in models]
    seen = 0
    for number, (args, kwargs, _) in enumerate(batches):
        said = [single(one.runner.output(len(steps) - 1, number, (args, kwargs))) for one in candidates]
        mean, goal = (goals_of(name, said, shares) for name in ("pre-activations", goals))
        held = held_out_rows(seen, mean)
        seen += len(held)
        for one, output in zip(candidates, said, strict=True):
            one.add(mean - output, goal - output, held)
    warn_of_few(seen, "examples are few for best_end", stacklevel=5)
    errors = [one.error(last, ridge) for one in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    LOGGER.info("best end: %d of %d; mean squared errors %s", best, len(errors), ", ".join(f"{e:.4g}" for e in errors))
    solve_layer(models[best], last, *candidates[best].wanted, ridge)
    return extract(models[best], merged)


class _Candidate:
    """An end, and the sums of its last layer on the examples to fit and on those held out: to choose, and as wanted."""

    def __init__(self, runner: Runner, *, alike: bool) -> None:
        self.runner = runner
        self.choice = NormalEquations(), NormalEquations()
        self.wanted = self.choice if alike else (NormalEquations(), NormalEquations())
        self.lack = 0.0

    def add(self, lacking: Tensor, wanted: Tensor, held: Tensor) -> None:
        """Add what the outputs of the batch that the runner saw last lack."""
        for place, mask in enumerate((~held, held)):
            X = single(self.runner.last_input[mask]).T
            gram = gram_product(X)
            self.choice[place].add(X, lacking[mask].T, gram)
            if self.wanted is not self.choice:
                self.wanted[place].add(X, wanted[mask].T, gram)
        self.lack += float(lacking[held].double().square().sum())

    def error(self, layer: Layer, ridge: float | None) -> float:
        """Mean squared error on the examples held out, the layer solved on the others."""
        fit, check = self.choice
        check_finite(layer, fit + check)
        intercept = layer.bias is not None
        chosen = choose_ridge(fit, check, intercept=intercept) if ridge is None else ridge
        return self.lack / max(1, check.count) + check.excess(*fit.solve(chosen, intercept=intercept))
