"""Normal equations of a linear layer, summed over batches: what least squares and RegMean need of its inputs.

Letters: ``X`` (m, samples) inputs, ``E`` (out, samples) targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of a Gram matrix that are computed at a time; what lies below the diagonal is mirrored.
_BLOCK = 128


def gram_product(X: Tensor) -> Tensor:
    """``X @ X.T`` in float64; products within a batch keep the dtype of ``X``.

    >>> gram_product(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]], dtype=torch.float64)
    """
    size = len(X)
    found = torch.empty(size, size, dtype=torch.float64, device=X.device)
    for start in range(0, size, _BLOCK):  # half of the work of the whole product
        stop = min(size, start + _BLOCK)
        part = (X[start:stop] @ X[start:].T).double()
        found[start:stop, start:] = part
        found[start:, start:stop] = part.T
    return found


class NormalEquations:
    """Sums of ``X X^T``, ``X E^T``, ``X``, ``E`` and a count, and the ridge solutions that follow from them.

    Examples
    --------
    >>> X, W = torch.randn(3, 50).double(), torch.randn(2, 3).double()
    >>> sums = NormalEquations()
    >>> sums.add(X, W @ X + 1)
    >>> change, shift = sums.solve(0.0, intercept=True)
    >>> bool(torch.allclose(change, W)), bool(torch.allclose(shift, torch.ones(2).double()))
    (True, True)
    """

    def __init__(self) -> None:
        self.count = 0
        self.gram = self.cross = self.x = self.e = torch.zeros((), dtype=torch.float64)

    def add(self, X: Tensor, E: Tensor, gram: Tensor | None = None) -> None:
        """Add samples; ``gram``, in float64, is their ``X X^T`` if it is known."""
        self.count += X.shape[1]
        self.gram = self.gram + (gram_product(X) if gram is None else gram)
        self.cross = self.cross + (E @ X.T).double()
        self.x = self.x + X.sum(1).double()  # the sum of a chunk is pairwise; in float64 it would take as long as E X^T
        self.e = self.e + E.sum(1).double()

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The equations of both sets of samples."""
        total = NormalEquations()
        total.count = self.count + other.count
        for name in ("gram", "cross", "x", "e"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def mean(self) -> Tensor:
        """Mean of the inputs, (m,)."""
        return self.x / max(1, self.count)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the inputs, (m, m), unbiased as BatchNorm's running variance is."""
        return (self.gram - self.count * torch.outer(self.mean, self.mean)) / max(1, self.count - 1)

    def solve(self, ridge: float, *, intercept: bool) -> tuple[Tensor, Tensor]:
        """``(D, d)`` with the smallest ``mean |E - D X - d|^2 + ridge * mean(variance of X) * |D|^2``.

        Inputs that are constant keep ``D = 0``; without ``intercept``, ``d = 0``.
        """
        count = max(1, self.count)
        G, R = self.gram / count, self.cross / count
        mean, goal = self.mean, self.e / count
        if intercept:
            G, R = G - torch.outer(mean, mean), R - torch.outer(goal, mean)
        scale = float(G.diagonal().mean())
        if not scale > 0:
            return torch.zeros_like(R), goal if intercept else torch.zeros_like(goal)
        D = _solve(G, R, ridge * scale)
        return D, goal - D @ mean if intercept else torch.zeros_like(goal)

    def excess(self, D: Tensor, d: Tensor) -> float:
        """Mean squared error of ``D X + d`` on these samples, less that of zero."""
        error = (D @ self.gram * D).sum() - 2 * (D * self.cross).sum()
        error = error + 2 * d @ (D @ self.x - self.e) + self.count * d @ d
        return float(error) / max(1, self.count)


def _solve(G: Tensor, R: Tensor, ridge: float) -> Tensor:
    """``R (G + ridge)^-1``; the pseudoinverse where that is singular."""
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    factor, info = torch.linalg.cholesky_ex(G + ridge * eye)
    pivots = factor.diagonal()
    if int(info) == 0 and float(pivots.min()) > 1e-7 * float(pivots.max()):
        solved: Tensor = torch.cholesky_solve(R.T, factor).T
        return solved
    values, vectors = torch.linalg.eigh(G)
    large = values > 1e-12 * values.max()
    inverse = torch.where(large, 1 / (values + ridge).clamp_min(torch.finfo(G.dtype).tiny), 0.0)
    pseudo: Tensor = (R @ vectors * inverse) @ vectors.T
    return pseudo
