"""Normal equations of a linear layer, summed over batches: what least squares and RegMean need of its inputs.

Letters: ``X`` (m, samples) inputs, ``E`` (out, samples) targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Rows of a Gram matrix that are computed at a time; what lies below the diagonal is mirrored.
_BLOCK = 128

#: standard deviations of noise in ``gram`` (off the diagonal), ``x``, ``cross`` and ``e``: see ``private_sums.py``
Noise = tuple[float, float, float, float]
EXACT: Noise = (0.0, 0.0, 0.0, 0.0)


def gram_product(X: Tensor) -> Tensor:
    """``X @ X.T``.

    >>> gram_product(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]])
    """
    size = len(X)
    found = X.new_empty(size, size)
    for start in range(0, size, _BLOCK):  # half of the work of the whole product
        stop = min(size, start + _BLOCK)
        part = X[start:stop] @ X[start:].T
        found[start:stop, start:] = part
        found[start:, start:stop] = part.T
    return found


def pack(symmetric: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (m, m), row after row: m (m + 1) / 2 numbers.

    >>> pack(torch.tensor([[1, 2], [2, 3]]))
    tensor([1, 2, 3])
    """
    return torch.cat([row[place:] for place, row in enumerate(symmetric)])


def unpack(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix (size, size) with that upper triangle.

    >>> unpack(torch.tensor([1, 2, 3]), 2)
    tensor([[1, 2],
            [2, 3]])
    """
    found, start = packed.new_empty(size, size), 0
    for place in range(size):
        row = packed[start : start + size - place]
        found[place, place:] = found[place:, place] = row
        start += size - place
    return found


class InputSums:
    """Sums of ``X X^T``, ``X`` and a count, in float64.

    Examples
    --------
    >>> sums = InputSums()
    >>> sums.add_inputs(torch.tensor([[1.0, 3.0]]))
    >>> sums.gram, sums.mean, sums.covariance
    (tensor([[10.]], dtype=torch.float64), tensor([2.], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.noise = EXACT
        self.gram = self.x = torch.zeros((), dtype=torch.float64, device="cpu")

    def add_inputs(self, X: Tensor, gram: Tensor | None = None) -> None:
        """Add samples; ``gram`` is their ``X X^T`` if it is known."""
        self.count += X.shape[1]
        self.gram = add_to(self.gram, gram_product(X) if gram is None else gram)
        self.x = add_to(self.x, X.sum(1))  # pairwise; in float64 it would take as long as a product

    @property
    def mean(self) -> Tensor:
        """Mean of the inputs, (m,)."""
        return self.x / max(1, self.count)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the inputs, (m, m), unbiased as BatchNorm's running variance is."""
        return (self.gram - self.count * torch.outer(self.mean, self.mean)) / max(1, self.count - 1)


def add_to(total: Tensor, part: Tensor) -> Tensor:
    """``total + part`` in float64, in place but for the first part."""
    return total.add_(part) if total.shape == part.shape else total.to(part.device) + part.double()


def _joined(one: Noise, other: Noise) -> Noise:
    gram, x, cross, e = map(math.hypot, one, other)
    return gram, x, cross, e


class NormalEquations(InputSums):
    """Sums of inputs, of ``X E^T`` and of ``E``, and the ridge solutions that follow from them.

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
        super().__init__()
        self.cross = self.e = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, X: Tensor, E: Tensor, gram: Tensor | None = None) -> None:
        """Add samples; ``gram`` is their ``X X^T`` if it is known."""
        self.add_inputs(X, gram)
        self.cross = add_to(self.cross, E @ X.T)
        self.e = add_to(self.e, E.sum(1))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The equations of both sets of samples."""
        total = NormalEquations()
        total.count = self.count + other.count
        total.noise = _joined(self.noise, other.noise)
        for name in ("gram", "cross", "x", "e"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def lower_goals(self, by: Tensor) -> NormalEquations:
        """The equations with ``E - by`` for ``E``; ``by`` (out,)."""
        total = NormalEquations()
        total.count, total.noise, total.gram, total.x = self.count, self.noise, self.gram.clone(), self.x.clone()
        if self.count:
            total.cross, total.e = self.cross - torch.outer(by, self.x), self.e - self.count * by
        return total

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
