"""The weight-matching objective of one pair over relaxed permutations: value, gradient, and value along a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.matching.grids import Grid, grids_of
from fedrebasin.matching.numbers import as_real
from fedrebasin.matching.relaxed import Relaxed, best_corner, between, corner
from fedrebasin.perms import Perms
from fedrebasin.spec import PermutationSpec

#: A slope below this is rounding, in units of |A| |B|.
TOLERANCE = 1e-7


@dataclass(frozen=True)
class _Term:
    grid: Grid
    reference: Tensor
    model: Tensor


class RelaxedProblem:
    """``f(P) = sum_l <W_l^A, P_l W_l^B P_{l-1}^T> / (|A| |B|)`` for doubly stochastic ``P``, over the tied parameters.

    At permutations it is the objective of :func:`fedrebasin.weight_matching` in units of the two norms. It is a
    polynomial; what is linear in one perm (biases, norms, first and last layers) is summed into ``linear`` once.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        reference: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        spec.check_state(reference, "reference")
        spec.check_state(model, "model")
        self.spec = spec
        tied = {axis.name for axes in spec.tied.values() for axis in axes} - set(spec.buffers)
        names = [name for name in spec.axes if name in tied]
        double = any(model[name].dtype in (torch.float64, torch.complex128) for name in names)
        where = device if device is not None else next((model[name].device for name in names), None)
        #: what relaxed permutations are like: their type and device
        self.like = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=where)
        first, norm = normalised(names, reference, "reference", self.like)
        second, other = normalised(names, model, "model", self.like)
        #: |A| |B|, the unit of all values
        self.scale = norm * other
        self.constant = 0.0
        self.linear: Relaxed = {}
        self.terms: list[_Term] = []
        for name in names:
            for grid in grids_of(spec.axes[name]):
                self._add(grid, grid.part(first[name]), grid.part(second[name]))
        self.degree = max((len(term.grid.factors) for term in self.terms), default=1)

    def _add(self, grid: Grid, reference: Tensor, model: Tensor) -> None:
        if not grid.factors:
            self.constant += float((reference * model).sum(dtype=torch.float64))
        elif len(grid.factors) > 1:
            self.terms.append(_Term(grid, reference, model))
        else:
            (factor,) = grid.factors
            similarity = grid.similarity(reference, model)
            if factor.row is not None:
                rows = similarity.new_zeros(self.spec.perm_shapes[factor.perm][0], *similarity.shape)
                rows[factor.row] = similarity
                similarity = rows
            held = self.linear.get(factor.perm)
            self.linear[factor.perm] = similarity if held is None else held + similarity

    def value(self, relaxed: Mapping[str, Tensor]) -> Tensor:
        """The objective, a float64 scalar; differentiable."""
        total = torch.full((), self.constant, dtype=torch.float64, device=self.like.device)
        for perm, similarity in self.linear.items():
            total = total + (similarity * relaxed[perm]).sum(dtype=torch.float64)
        for term in self.terms:
            total = total + (term.reference * term.grid.apply(relaxed, term.model)).sum(dtype=torch.float64)
        return total

    def gradient(self, relaxed: Mapping[str, Tensor]) -> tuple[float, Relaxed]:
        """The objective and its derivative in every relaxed permutation."""
        leaves = {perm: tensor.detach().requires_grad_() for perm, tensor in relaxed.items()}
        with torch.enable_grad():
            value = self.value(leaves)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return float(value.detach()), dict(zip(leaves, found, strict=True))

    def step(self, relaxed: Mapping[str, Tensor]) -> tuple[Perms, float, float]:
        """Frank-Wolfe's: the permutations ``S`` for which ``<grad f(P), S>`` is largest; ``f(P)``; the slope to ``S``.

        The slope is zero, but for rounding, where no permutation is better to first order.
        """
        if not relaxed:
            return {}, self.constant, 0.0
        value, gradient = self.gradient(relaxed)
        perms = best_corner(self.spec, gradient)
        end = corner(self.spec, perms, self.like)
        slope = sum(float((gradient[perm] * (end[perm] - at)).sum(dtype=torch.float64)) for perm, at in relaxed.items())
        return perms, value, slope

    @torch.no_grad()
    def polynomial(
        self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, slope: float, at_start: float
    ) -> np.ndarray:
        """Coefficients, constant first, of the objective on the line from ``start`` (0) to ``end`` (1)."""
        return polynomial_of(
            lambda lam: float(self.value(between(start, end, lam))), self.degree, slope=slope, at_start=at_start
        )


def polynomial_of(value: Callable[[float], float], degree: int, *, slope: float, at_start: float) -> np.ndarray:
    """Coefficients, constant first, of a polynomial whose value and slope at 0 are known, by its values in (0, 1].

    >>> polynomial_of(lambda lam: lam + 2 * lam**2, 2, slope=1.0, at_start=0.0)
    array([0., 1., 2.])
    """
    powers = np.arange(2, degree + 1)
    points = (powers - 1) / max(1, degree - 1)
    values = np.array([value(float(point)) for point in points])
    curved = np.linalg.solve(points[:, None] ** powers, values - at_start - slope * points)
    return np.concatenate([[at_start, slope], curved])


def best_point(coefficients: np.ndarray) -> float:
    """Where in [0, 1] a polynomial, its constant first, is largest; the larger of equal points.

    >>> best_point(np.array([0.0, 1.0, -2.0]))
    0.25
    """
    polynomial = np.polynomial.Polynomial(coefficients)
    roots = map(complex, polynomial.deriv().roots())
    inside = [root.real for root in roots if abs(root.imag) < 1e-9 and 0 < root.real < 1]
    return max([0.0, 1.0, *inside], key=lambda point: (float(polynomial(point)), point))


def normalised(
    names: list[str], state: Mapping[str, Tensor], label: str, like: Tensor
) -> tuple[dict[str, Tensor], float]:
    """The tensors over their common norm, so that no product overflows, whatever the model's scale."""
    norms = {}
    for name in names:
        norms[name] = float(torch.linalg.vector_norm(as_real(state[name]).double()))
        if not math.isfinite(norms[name]):
            raise SpecMismatchError(
                f"{label}: {name!r} holds a NaN, an infinity or numbers whose squares overflow; leave this model out"
            )
    norm = math.hypot(*norms.values())
    return {name: (as_real(state[name]).double() / (norm or 1.0)).to(like) for name in names}, norm
