"""The Sinkhorn operator: from any square matrix to a doubly stochastic one, with its exact derivative.

Index letters: i row, j column; u, v potentials of rows and columns; a, b scalings, which are their exponentials.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError

#: How gradients pass through :func:`sinkhorn`.
GRADIENTS = ("implicit", "unrolled")
#: Entries below exp(-_DEEP) of a matrix that is being scaled are taken as exp(-_DEEP): no underflow, no slow numbers.
_DEEP = 60.0
_PASSES = 20
_NEWTON_STEPS = 100


def sinkhorn(logits: Tensor, *, tolerance: float = 1e-9, gradient: str = "implicit", iterations: int = 20) -> Tensor:
    """Scale rows and columns of ``exp(logits)`` until all sum to one.

    Parameters
    ----------
    logits : Tensor, shape (..., n, n), floating
        Their exponentials may overflow. Where they differ by more than about 1e6, float64 misses the tolerance.
    tolerance : float
        How far a sum may be from one, before the result is rounded to the type of ``logits``.
    gradient : {"implicit", "unrolled"}
        From the equations that the solution satisfies, at the cost of one linear system; or back through exactly
        ``iterations`` passes over columns and rows, after which the columns' sums may still be far from one.

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
    Sinkhorn (1964); Schmitzer (2019), "Stabilized sparse scaling algorithms"; Brauer, Clason, Lorenz, Wirth (2017),
    "A Sinkhorn-Newton method for entropic optimal transport"; Eisenberger, Toker, Leal-Taixe, Bernard, Cremers (2022),
    "A unified framework for implicit Sinkhorn differentiation".

    Examples
    --------
    >>> sinkhorn(torch.tensor([[1e4, 0.0], [0.0, 0.0]])).round(decimals=6)
    tensor([[1., 0.],
            [0., 1.]])
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2] or logits.shape[-1] == 0:
        raise RebasinError(f"logits: expected square matrices; got shape {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise RebasinError("logits: expected finite entries; got a NaN or an infinity")
    if gradient not in GRADIENTS:
        raise RebasinError(f"gradient: expected one of {', '.join(GRADIENTS)}; got {gradient!r}")
    if gradient == "unrolled":
        return _unrolled(logits, iterations)
    found: Tensor = _Implicit.apply(logits, *_potentials(logits, tolerance))
    return found


def _unrolled(logits: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


@torch.no_grad()
def _potentials(logits: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """``u, v``, float64 ``(..., n)``, such that ``exp(logits_ij + u_i + v_j)`` is doubly stochastic.

    Passes of scaling come near; near a permutation they would crawl, and Newton steps take over. Large logits are
    reached by doubling smaller ones, whose potentials are a start for the next.
    """
    X = logits.detach().double()
    v = torch.zeros_like(X[..., 0, :])
    spread = float((X.amax((-1, -2)) - X.amin((-1, -2))).max()) if X.numel() else 0.0
    for left in range(max(0, math.ceil(math.log2(max(spread, 1.0) / _DEEP))), 0, -1):
        v = 2 * _solve(X * 0.5**left, v, 1e-2)[1]
    return _solve(X, v, tolerance)


def _solve(X: Tensor, v: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Scaling passes, then Newton steps on the dual, which is concave: its gradient are the sums that are missing."""
    u, v = _passes(X, v)
    P = _plan(X, u, v)
    for _ in range(_NEWTON_STEPS):
        missing = 1 - P.sum(-2)
        if float(missing.abs().max()) <= tolerance:
            break
        du, dv = _tangent(P, torch.zeros_like(missing), missing)
        u, v, P = _search(X, u, v, P, du, dv)
    return u, v


def _passes(X: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = _normaliser(X + v.unsqueeze(-2))
    kernel = _plan(X, u, v)
    a = torch.ones_like(u).unsqueeze(-1)
    for _ in range(_PASSES):
        b = (kernel.mT @ a).reciprocal_()
        a = (kernel @ b).reciprocal_()
    v = v + b.squeeze(-1).log()
    return _normaliser(X + v.unsqueeze(-2)), v


def _search(X: Tensor, u: Tensor, v: Tensor, P: Tensor, du: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The longest of the steps 1, 1/2, 1/4, ... that raises the dual ``sum u + sum v - sum P``."""
    before = u.sum() + v.sum() - P.sum()
    slope = (du * (1 - P.sum(-1))).sum() + (dv * (1 - P.sum(-2))).sum()
    step = 1.0
    while True:
        new_v = v + step * dv
        new_u = _normaliser(X + new_v.unsqueeze(-2))
        new = _plan(X, new_u, new_v)
        if step < 1e-6 or new_u.sum() + new_v.sum() - new.sum() >= before + 1e-4 * step * slope:
            return new_u, new_v, new
        step /= 2


def _tangent(P: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """``a, b`` such that the entries ``P_ij (a_i + b_j)`` have these sums over rows and columns.

    The Laplacian that is left after ``b`` is eliminated is singular along constants, which one rank takes care of;
    where ``P`` falls apart into blocks there are more such directions, in which a trace of ridge holds ``a`` still.
    """
    r, c = P.sum(-1), P.sum(-2)
    right = rows - (P @ (columns / c).unsqueeze(-1)).squeeze(-1)
    laplacian = -(P / c.unsqueeze(-2)) @ P.mT + 1 / P.shape[-1]
    laplacian.diagonal(dim1=-2, dim2=-1).add_(r + 1e-13)
    a = torch.linalg.solve(laplacian, right)
    return a, (columns - (P.mT @ a.unsqueeze(-1)).squeeze(-1)) / c


def _plan(X: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (X + u.unsqueeze(-1) + v.unsqueeze(-2)).clamp_(min=-_DEEP).exp_()


def _normaliser(X: Tensor) -> Tensor:
    """``-logsumexp`` over the last axis, without numbers too small to be fast."""
    largest = X.amax(-1, keepdim=True)
    return -((X - largest).clamp_(min=-_DEEP).exp_().sum(-1).log() + largest.squeeze(-1))


class _Implicit(torch.autograd.Function):
    """``P_ij = exp(X_ij + u_i + v_j)``, whose rows and columns keep their sums: ``dX = P * (G - a_i - b_j)``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, u: Tensor, v: Tensor) -> Tensor:
        plan = _plan(logits.double(), u, v)
        ctx.save_for_backward(plan)
        return plan.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (P,) = ctx.saved_tensors
        G = gradients[0].double()
        a, b = _tangent(P, (P * G).sum(-1), (P * G).sum(-2))
        return (P * (G - a.unsqueeze(-1) - b.unsqueeze(-2))).to(gradients[0].dtype), None, None
