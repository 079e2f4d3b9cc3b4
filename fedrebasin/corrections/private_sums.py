"""Gram matrices and normal equations with differential privacy: rows are clipped, symmetric noise is added.

Letters: ``x`` (m,) a layer's input at one position of an example, ``e`` (out,) its target.

Both are joined to one row ``u = (x, t, g e)`` with ``t = clip sqrt(m) / 2`` and ``g = sqrt(m / out) / 2``, and a row
that is longer than ``B = clip sqrt(m (1 + 1/4 + 1/4))``, without targets ``clip sqrt(m (1 + 1/4))``, is scaled to
that length: inputs and targets of a root mean square of ``clip`` just fit. One factor for the whole row makes it a
weight of the example, which what is linear between ``x`` and ``e`` survives; the weights are released with the sums,
which are then divided by their mean. An example's share is the mean of ``u u^T`` over its positions, which is
positive semi-definite and of Frobenius norm ``B^2`` at most; two such matrices have an inner product of 0 or more, so
that replacing one example moves the sum of all by at most ``sqrt(2) B^2``. The upper triangle, its entries off the
diagonal times ``sqrt(2)``, has that norm as a vector; it gets Gaussian noise of standard deviation ``noise * sqrt(2)
B^2``, and is one release of ``privacy.py``. Entries off the diagonal thus have noise of ``noise * B^2``. Sums over
the examples that are fitted and over those held out see different examples, or parts of one whose norms sum to
``B^2`` at most: one release for both. What is made of
them afterwards (no negative eigenvalues, a ridge) is free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedrebasin.corrections.normal_equations import NormalEquations, add_to, gram_product
from fedrebasin.corrections.privacy import Privacy, check_positions, source_of_noise

#: the 1 of the bias, and the targets, as shares of the length of the inputs
_SHARE = 0.5
#: mean weights of the examples below this are not believed
_LEAST = 0.05


class ClippedEquations(NormalEquations):
    """Sums of clipped examples; :meth:`release` adds the noise. A sample is an example here, whatever its positions.

    Examples
    --------
    >>> sums = ClippedEquations(Privacy(clip=5.0, noise=1e-9))
    >>> sums.add_clipped(torch.tensor([[3.0], [4.0]]), None, positions=1)
    >>> sums.release(seed=0).gram  # the row fits; noise is small
    tensor([[ 9.0000, 12.0000],
            [12.0000, 16.0000]], dtype=torch.float64)
    """

    def __init__(self, privacy: Privacy) -> None:
        super().__init__()
        self.privacy, self.weight, self._examples = privacy, 0.0, 0.0

    def add_clipped(self, X: Tensor, E: Tensor | None, *, positions: float) -> None:
        """Add samples (m, samples), of which an example has so many, and their targets (out, samples)."""
        check_positions(positions)
        X, m = X.nan_to_num(0.0, 0.0, 0.0), len(X)
        squares = X.square().sum(0) + self._t(m) ** 2
        if E is not None:
            E = E.nan_to_num(0.0, 0.0, 0.0)
            squares = squares + _g(m, len(E)) ** 2 * E.square().sum(0)
        bound = noise_of(self.privacy, m, goals=E is not None) / self.privacy.noise
        factor = (math.sqrt(bound) / squares.sqrt()).clamp(max=1.0) / math.sqrt(positions)
        X = X * factor
        self.gram, self.x = add_to(self.gram, gram_product(X)), add_to(self.x, X @ factor)
        self.weight += float(factor.square().sum())
        self._examples += X.shape[1] / positions
        self.count = round(self._examples)
        if E is not None:
            E = E * factor
            self.cross, self.e = add_to(self.cross, E @ X.T), add_to(self.e, E @ factor)

    def release(self, seed: int | None = None) -> ClippedEquations:
        """Add the noise, once, from the system's source of randomness, or from ``seed`` (for tests)."""
        if not self.count:
            return self
        m, goals, draw = len(self.x), self.cross.ndim > 0, source_of_noise(seed)
        noise, t = noise_of(self.privacy, m, goals=goals), self._t(m)
        square = draw(self.gram)
        self.gram = self.gram + noise * (square + square.T) / math.sqrt(2)
        self.x = self.x + noise / t * draw(self.x)
        weight = self.weight + math.sqrt(2) * noise / t**2 * float(draw(torch.zeros((), device="cpu")))
        g = _g(m, len(self.e)) if goals else math.inf
        if goals:
            self.cross = self.cross + noise / g * draw(self.cross)
            self.e = self.e + noise / (g * t) * draw(self.e)
        scale = self.count / min(self.count, max(weight, _LEAST * self.count))
        self.gram, self.x, self.cross, self.e = (scale * sums for sums in (self.gram, self.x, self.cross, self.e))
        noise *= scale
        self.noise, self.weight = (noise, noise / t, noise / g, noise / (g * t)), weight
        return self

    def _t(self, inputs: int) -> float:
        return _SHARE * self.privacy.clip * math.sqrt(inputs)


def _g(inputs: int, outputs: int) -> float:
    return _SHARE * math.sqrt(inputs / outputs)


def noise_of(privacy: Privacy, inputs: int, *, goals: bool = False) -> float:
    """Standard deviation of the noise off the diagonal of a Gram matrix of so many inputs.

    >>> noise_of(Privacy(clip=2.0, noise=3.0), 10)
    150.0
    """
    return privacy.noise * privacy.clip**2 * inputs * (1 + _SHARE**2 * (2 if goals else 1))


def new_equations(privacy: Privacy | None) -> NormalEquations:
    """Empty sums: exact ones without ``privacy``."""
    return NormalEquations() if privacy is None else ClippedEquations(privacy)
