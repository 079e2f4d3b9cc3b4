"""The Sinkhorn operator: from any square matrix to a doubly stochastic one, with its exact derivative.

Index letters: i row, j column; u, v potentials of rows and columns, a, b scalings, which are their exponentials.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError

#: Entries below exp(-_DEEP) of a matrix that is being scaled are taken as exp(-_DEEP): no underflow, no slow numbers.
_DEEP = 60.0
_EVERY = 10


def sinkhorn(
    logits: Tensor,
    *,
    iterations: int = 1000,
    tolerance: float = 1e-6,
    gradient: str = "implicit",
    start: Tensor | None = None,
) -> Tensor:
    """Scale rows and columns of ``exp(logits)`` until all sum to one.

    Parameters
    ----------
    logits : Tensor, shape (..., n, n), floating
        Of any size: ``exp`` of them may overflow.
    iterations : int
        At most so many passes over rows and columns; with ``gradient="unrolled"`` exactly so many.
    tolerance : float
        Passes stop once every sum of a column is so near to one (rows are exact).
    gradient : {"implicit", "unrolled"}
        Through the solution's equations, at the cost of one linear system, or back through every pass.
    start : Tensor, shape (..., n), optional
        Potentials of the columns to start from, as :func:`potentials` gives them.

    Returns
    -------
    Tensor, shape (..., n, n)
        Doubly stochastic.

    Raises
    ------
    RebasinError
        If ``logits`` are not square or not finite, or ``gradient`` is unknown.

    References
    ----------
    Sinkhorn (1964); Schmitzer (2019), "Stabilized sparse scaling algorithms" (scaling with absorbed potentials);
    Eisenberger, Toker, Leal-Taixe, Bernard, Cremers (2022), "A unified framework for implicit Sinkhorn differentiation".

    Examples
    --------
    >>> sinkhorn(torch.tensor([[1e4, 0.0], [0.0, 0.0]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2] or not bool(logits.isfinite().all()):
        raise RebasinError(f"logits: expected finite square matrices; got shape {tuple(logits.shape)}, NaN or infinity")
    if gradient == "unrolled":
        return unrolled(logits, iterations)
    if gradient != "implicit":
        raise RebasinError(f"gradient: expected one of implicit, unrolled; got {gradient!r}")
    rows, columns = potentials(logits, iterations=iterations, tolerance=tolerance, start=start)
    found: Tensor = _Implicit.apply(logits, rows, columns)
    return found


def unrolled(logits: Tensor, iterations: int) -> Tensor:
    """Plain Sinkhorn iterations in the log domain, columns first, differentiated one by one."""
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


@torch.no_grad()
def potentials(
    logits: Tensor, *, iterations: int = 1000, tolerance: float = 1e-6, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``u, v`` of shape ``(..., n)`` such that ``exp(logits + u_i + v_j)`` is doubly stochastic.

    Without ``start`` large logits are reached by doubling small ones, whose potentials are a start for the next.
    """
    logits = logits.detach()
    if start is not None:
        return _scale(logits, start, iterations, tolerance)
    spread = float((logits.amax((-1, -2)) - logits.amin((-1, -2))).max())
    doublings = max(0, math.ceil(math.log2(max(spread, 1.0) / _DEEP)))
    columns = torch.zeros_like(logits[..., 0, :])
    for left in range(doublings, 0, -1):
        columns = 2 * _scale(logits * 0.5**left, columns, 100, 0.1)[1]
    return _scale(logits, columns, iterations, tolerance)


def _scale(logits: Tensor, columns: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    rows = _normaliser(logits + columns.unsqueeze(-2))
    left = iterations
    while True:
        kernel = (logits + rows.unsqueeze(-1) + columns.unsqueeze(-2)).clamp_(min=-_DEEP).exp_()
        a = torch.ones_like(rows).unsqueeze(-1)
        error = math.inf
        for _ in range(min(left, 10 * _EVERY) // _EVERY or 1):
            for _ in range(_EVERY):
                b = 1 / (kernel.mT @ a)
                a = 1 / (kernel @ b)
            error = float((b * (kernel.mT @ a) - 1).abs().max())
            left -= _EVERY
            if error <= tolerance:
                break
        columns = columns + b.squeeze(-1).log()
        moved = float(a.log().abs().max())
        rows = _normaliser(logits + columns.unsqueeze(-2))
        if left <= 0 or (error <= tolerance and moved < _DEEP / 2):
            return rows, columns


def _normaliser(logits: Tensor) -> Tensor:
    """``-logsumexp`` over the last axis, without numbers too small to be fast."""
    largest = logits.amax(-1, keepdim=True)
    return -((logits - largest).clamp_(min=-_DEEP).exp_().sum(-1).log() + largest.squeeze(-1))


class _Implicit(torch.autograd.Function):
    """``P_ij = exp(X_ij + u_i + v_j)`` with the derivative that rows and columns that keep their sums have.

    ``dX = P * (G - a_i - b_j)``, where ``a`` and ``b`` make its rows and columns sum to zero.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        plan = (logits + rows.unsqueeze(-1) + columns.unsqueeze(-2)).clamp_(min=-_DEEP).exp_()
        ctx.save_for_backward(plan)
        return plan

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (plan,) = ctx.saved_tensors
        P, G = plan.double(), gradients[0].double()
        moved = P * G
        row_sums, column_sums = P.sum(-1), P.sum(-2)
        right = moved.sum(-1) - (P @ (moved.sum(-2) / column_sums).unsqueeze(-1)).squeeze(-1)
        n = P.shape[-1]
        # The Laplacian of the rows: singular along constants, which one rank and a trace of ridge take care of.
        system = -(P / column_sums.unsqueeze(-2)) @ P.mT + 1 / n
        system.diagonal(dim1=-2, dim2=-1).add_(row_sums + 1e-12)
        a = torch.linalg.solve(system, right)
        b = (moved.sum(-2) - (P.mT @ a.unsqueeze(-1)).squeeze(-1)) / column_sums
        return (P * (G - a.unsqueeze(-1) - b.unsqueeze(-2))).to(plan.dtype), None, None
