"""The objective of many models over relaxed permutations: value, gradient, and value along a line.

Index letters: p, q models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedrebasin.matching.grids import Grid, grids_of
from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.relaxed import Relaxed, between
from fedrebasin.matching.relaxed_problem import normalised, polynomial_of


class RelaxedMany:
    """``f = sum_{p<q} c_p c_q <P_p M_p, P_q M_q>`` in units of the squared mean norm, for doubly stochastic ``P_p``.

    It is a polynomial in the entries of all ``P_p``, and linear in each.
    """

    def __init__(self, problem: ManyProblem) -> None:
        self.spec = problem.spec
        pairs = problem.pairs
        first = next((pair.model[name] for pair in pairs for name in problem.plan.names), torch.zeros((), device="cpu"))
        #: what relaxed permutations are like: their type and device
        self.like = torch.zeros((), dtype=pairs[0].dtype, device=first.device)
        found = [normalised(problem.plan.names, pair.model, "models", self.like) for pair in pairs]
        weights = [c * norm for c, (_, norm) in zip(problem.coefficients, found, strict=True)]
        #: the unit of all values
        self.scale = math.fsum(weights) ** 2 or 1.0
        self.weights = [weight / (math.fsum(weights) or 1.0) for weight in weights]
        grids = [(name, grid) for name in problem.plan.names for grid in grids_of(self.spec.axes[name])]
        self.terms = [(grid, [grid.part(states[name]) for states, _ in found]) for name, grid in grids if grid.factors]
        #: a constant part is left out; each pair's term is of the degree of both sides' factors
        self.degree = 2 * max((len(grid.factors) for grid, _ in self.terms), default=1)

    def _term(self, grid: Grid, parts: Sequence[Tensor], relaxed: Sequence[Relaxed]) -> Tensor:
        moved = [w * grid.apply(own, part) for w, own, part in zip(self.weights, relaxed, parts, strict=True)]
        total = torch.stack(moved).sum(0)
        own = torch.stack([tensor.square().sum(dtype=torch.float64) for tensor in moved]).sum()
        return (total.square().sum(dtype=torch.float64) - own) / 2

    @torch.no_grad()
    def value(self, relaxed: Sequence[Relaxed]) -> float:
        """The objective, but for what no permutation moves."""
        return math.fsum(float(self._term(grid, parts, relaxed)) for grid, parts in self.terms)

    def gradient(self, relaxed: Sequence[Relaxed]) -> tuple[float, list[Relaxed]]:
        """The objective and its derivative in every relaxed permutation of every model, one tensor after the other."""
        leaves = [{perm: tensor.detach().requires_grad_() for perm, tensor in own.items()} for own in relaxed]
        flat = [tensor for own in leaves for tensor in own.values()]
        sums = [torch.zeros_like(tensor) for tensor in flat]
        values = []
        for grid, parts in self.terms:
            with torch.enable_grad():
                value = self._term(grid, parts, leaves)
                found = torch.autograd.grad(value, flat, allow_unused=True)
            values.append(float(value.detach()))
            for held, part in zip(sums, found, strict=True):
                if part is not None:
                    held += part
        rest = iter(sums)
        return math.fsum(values), [{perm: next(rest) for perm in own} for own in leaves]

    def polynomial(
        self, start: Sequence[Relaxed], end: Sequence[Relaxed], *, slope: float, at_start: float
    ) -> np.ndarray:
        """Coefficients, constant first, of the objective on the line from ``start`` (0) to ``end`` (1)."""
        return polynomial_of(
            lambda lam: self.value(on_the_way(start, end, lam)), self.degree, slope=slope, at_start=at_start
        )


def on_the_way(start: Sequence[Relaxed], end: Sequence[Relaxed], lam: float) -> list[Relaxed]:
    """``(1 - lam) * start + lam * end`` for every model."""
    return [between(first, last, lam) for first, last in zip(start, end, strict=True)]
