"""How good a network is on held-out batches: its loss, or how far it is from what the ends say together.

Letters: ``c_k`` coefficients, ``z_k`` the ends' outputs, ``p`` the measured network's probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from fedrebasin.batches import Batches, count_examples, tensors
from fedrebasin.corrections.working import load
from fedrebasin.errors import CalibrationError

State = Mapping[str, Tensor]
Loss = Callable[[Any, Any], Tensor]
#: With this confidence a model alone must be better than the best merge.
CONFIDENCE = 0.975


class ByLoss:
    """Mean loss of each batch, for batches with targets."""

    kind = "loss"

    def __init__(self, batches: Batches, loss: Loss) -> None:
        self.batches, self.loss = batches, loss
        self.sizes = [count_examples(args, kwargs, target) for args, kwargs, target in batches]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        """One number for each batch, float64; lower is better."""
        found = [float(self.loss(model(*args, **kwargs), target)) for args, kwargs, target in self.batches]
        return torch.tensor(found, dtype=torch.float64, device="cpu")


class ByAgreement:
    """How far a network's (first) output is from the ensemble's, in the mean over each batch.

    Rows of two or more numbers, ``(n, classes)``, are taken as logits (or as probabilities, where they are such): the
    measure is the squared distance ``|p - softmax(sum_k c_k z_k)|^2``. For other outputs it is the mean squared
    difference to ``sum_k c_k z_k``, as a share of the ensemble's variance.

    Notes
    -----
    Why the mean of logits and not of probabilities: ends that saw few examples of a class are sure of themselves where
    they are wrong, the mean of probabilities is blunt there, and a candidate that is blunt too (a distilled one, or an
    average whose activations have collapsed) agrees with it best. Why a squared distance and no divergence, which is
    dear where one side is sure: how sure a merge is depends on its correction. ``simulations/bench/selection.py``
    measures these and others.
    """

    kind = "distance"

    def __init__(self, model: nn.Module, batches: Batches, ends: Sequence[State], weights: Sequence[float]) -> None:
        self.batches = batches
        self.sizes = [count_examples(args, kwargs, target) for args, kwargs, target in batches]
        self.goals: list[Tensor] = []
        for end, weight in zip(ends, weights, strict=True):
            load(model, end)
            said = [weight * output for output in self._outputs(model)]
            self.goals = [a + b for a, b in zip(self.goals, said, strict=True)] if self.goals else said
        self.classes = all(goal.ndim == 2 and goal.shape[1] > 1 for goal in self.goals)
        numbers = torch.cat([goal.flatten() for goal in self.goals])
        self.variance = float(numbers.var(correction=0)) or 1.0

    def __call__(self, model: nn.Module) -> Tensor:
        """One number for each batch, float64; lower is better."""
        pairs = zip(self.goals, self._outputs(model), strict=True)
        return torch.stack([self._distance(goal, output) for goal, output in pairs]).cpu()

    def _distance(self, goal: Tensor, output: Tensor) -> Tensor:
        if self.classes:
            return (output.softmax(1) - goal.softmax(1)).square().sum(1).mean()
        return (output - goal).square().mean() / self.variance

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        found = []
        for args, kwargs, _ in self.batches:
            outputs = tensors(model(*args, **kwargs))
            if not outputs:
                raise CalibrationError("net: expected a floating output to compare with the ensemble's; got none")
            found.append(_logits(outputs[0].double()))
        return found


def _logits(output: Tensor) -> Tensor:
    """Logarithms of rows that are probabilities; all else as it is.

    >>> _logits(torch.tensor([[0.25, 0.75]])).exp()
    tensor([[0.2500, 0.7500]])
    """
    if output.ndim == 2 and output.shape[1] > 1 and bool((output >= 0).all()):
        sums = output.sum(1)
        if torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            return output.clamp_min(1e-12).log()
    return output


def mean_over_batches(values: Tensor, sizes: Sequence[int]) -> float:
    """The mean over examples of what was measured batch by batch.

    >>> mean_over_batches(torch.tensor([1.0, 4.0]), [2, 1])
    2.0
    """
    weights = torch.tensor(sizes, dtype=torch.float64, device=values.device)
    return float((values * weights).sum() / weights.sum())


def is_better(values: Tensor, others: Tensor, sizes: Sequence[int]) -> bool:
    """Whether ``values`` are lower than ``others`` beyond chance, batch by batch.

    >>> is_better(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.1, 3.9]), [1, 1, 1])
    True
    >>> is_better(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 2.1, 2.9]), [1, 1, 1])
    False
    """
    count = len(sizes)
    if count < 2:
        return False
    gains = (others - values).double()
    weights = torch.tensor(sizes, dtype=torch.float64, device=gains.device)
    weights = weights / weights.sum()
    mean = float((weights * gains).sum())
    error = math.sqrt(count / (count - 1) * float((weights * (gains - mean)).square().sum()))
    return mean > float(stats.t.ppf(CONFIDENCE, count - 1)) * error
