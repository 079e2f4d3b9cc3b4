"""The weight-matching objective of one pair over relaxed permutations: value, gradient, and value along a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.matching.relaxed import Grid, Relaxed, grids_of
from fedrebasin.permute import permute_tensor
from fedrebasin.spec import PermutationSpec

#: Beyond this entries are taken as float64: their squares would overflow in float32.
_LARGE = 1e15


@dataclass(frozen=True)
class _Term:
    grid: Grid
    reference: Tensor
    model: Tensor


class RelaxedProblem:
    """``f(P) = sum_l <W_l^A, P_l W_l^B P_{l-1}^T> / (|A| |B|)`` for doubly stochastic ``P``, over the tied parameters.

    At permutations it is the objective of :func:`fedrebasin.weight_matching` up to that scale. It is a polynomial;
    what is linear in one perm (biases, norms, first and last layers) is summed into ``linear`` once.
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
        self.reference = {name: _prepare(reference[name], name, "reference", device) for name in names}
        self.model = {name: _prepare(model[name], name, "model", device) for name in names}
        scales = [math.sqrt(math.fsum(dot(t, t) for t in state.values())) for state in (self.reference, self.model)]
        self.scale = scales[0] * scales[1] or 1.0
        self.like = torch.zeros(
            (),
            dtype=torch.float64 if any(t.dtype == torch.float64 for t in self.model.values()) else torch.float32,
            device=device if device is not None else next(iter(self.model.values()), torch.zeros(())).device,
        )
        self.constant = 0.0
        self.linear: Relaxed = {}
        self.terms: list[_Term] = []
        for name in names:
            for grid in grids_of(spec.axes[name]):
                self._add(grid, grid.part(self.reference[name]), grid.part(self.model[name]))
        self.degree = max((len(term.grid.factors) for term in self.terms), default=1)

    def _add(self, grid: Grid, reference: Tensor, model: Tensor) -> None:
        if not grid.factors:
            self.constant += dot(reference, model) / self.scale
        elif len(grid.factors) > 1:
            self.terms.append(_Term(grid, reference.to(self.like.dtype), model.to(self.like.dtype)))
        else:
            (factor,) = grid.factors
            similarity = grid.similarity(reference.to(self.like.dtype), model.to(self.like.dtype)) / self.scale
            if factor.row is None:
                held = self.linear.get(factor.perm)
                self.linear[factor.perm] = similarity if held is None else held + similarity
            else:
                rows = self.spec.perm_shapes[factor.perm][0]
                held = self.linear.setdefault(factor.perm, similarity.new_zeros(rows, *similarity.shape))
                held[factor.row] += similarity

    def value(self, relaxed: Mapping[str, Tensor]) -> Tensor:
        """The objective, a float64 scalar; differentiable."""
        total = torch.full((), self.constant, dtype=torch.float64, device=self.like.device)
        for perm, similarity in self.linear.items():
            total = total + (similarity * relaxed[perm]).sum(dtype=torch.float64)
        for term in self.terms:
            moved = term.grid.apply(relaxed, term.model)
            total = total + (term.reference * moved).sum(dtype=torch.float64) / self.scale
        return total

    def gradient(self, relaxed: Mapping[str, Tensor]) -> tuple[float, Relaxed]:
        """The objective and its derivative in every relaxed permutation."""
        leaves = {perm: tensor.detach().requires_grad_() for perm, tensor in relaxed.items()}
        with torch.enable_grad():
            value = self.value(leaves)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return float(value.detach()), dict(zip(leaves, found, strict=True))

    def polynomial(
        self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, slope: float, at_start: float
    ) -> np.ndarray:
        """Coefficients, constant first, of the objective on the line from ``start`` (0) to ``end`` (1)."""
        points = np.arange(1, self.degree) / (self.degree - 1) if self.degree > 1 else np.empty(0)
        with torch.no_grad():
            values = [float(self.value(between(start, end, float(point)))) for point in points]
        right = np.array(values) - at_start - slope * points
        powers = np.arange(2, self.degree + 1)
        curved = np.linalg.solve(points[:, None] ** powers, right) if self.degree > 1 else np.empty(0)
        return np.concatenate([[at_start, slope], curved])

    def objective(self, perms: Mapping[str, Tensor]) -> float:
        """The objective of permutations, not scaled."""
        axes = self.spec.axes
        return math.fsum(
            dot(self.reference[name], permute_tensor(axes[name], perms, tensor)) for name, tensor in self.model.items()
        )


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], lam: float) -> Relaxed:
    """``(1 - lam) * start + lam * end``."""
    return {perm: torch.lerp(tensor, end[perm], lam) for perm, tensor in start.items()}


def best_point(coefficients: np.ndarray) -> float:
    """Where in [0, 1] a polynomial, its constant first, is largest; the larger of equal points.

    >>> best_point(np.array([0.0, 1.0, -2.0]))
    0.25
    """
    polynomial = np.polynomial.Polynomial(coefficients)
    slope = polynomial.deriv()
    roots = [complex(root) for root in slope.roots()] if slope.degree() > 0 or slope.coef[0] != 0 else []
    inside = [root.real for root in roots if abs(root.imag) < 1e-12 and 0 < root.real < 1]
    return max([1.0, 0.0, *inside], key=lambda point: (float(polynomial(point)), point))


def dot(first: Tensor, second: Tensor) -> float:
    """The sum of products in float64."""
    return float(torch.dot(first.reshape(-1).double(), second.reshape(-1).double()))


def _prepare(tensor: Tensor, name: str, label: str, device: torch.device | str | None) -> Tensor:
    tensor = tensor.detach()
    if device is not None:
        tensor = tensor.to(device)
    if not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if not bool(tensor.isfinite().all()):
        raise SpecMismatchError(f"{label}: {name!r} holds a NaN or an infinity; leave this model out")
    return tensor.double() if tensor.numel() and float(tensor.abs().max()) > _LARGE else tensor
