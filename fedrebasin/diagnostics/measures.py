"""How alike two sets of activations are: measures that are summed up batch by batch.

Index letters: n examples, i unit, d feature; K and L are the Gram matrices of the two networks' examples.

Each measure takes activations ``(units, examples, ...)``. CKA and relative representations flatten all but the
examples into features; Procrustes and the correlation take each pixel or step as an observation of the units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from fedrebasin.errors import CalibrationError
from fedrebasin.matching.correlation import CrossMoments


class Measure(Protocol):
    """Sums over batches, and what they amount to."""

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a batch: both networks' activations, shape ``(units, examples, ...)``."""

    def value(self) -> float:
        """The measure over everything that was added."""


class Cka:
    """Linear CKA from minibatches: the unbiased HSIC of each, averaged (Nguyen et al., 2021, Equation 4)."""

    def __init__(self) -> None:
        self._sums, self._largest = [0.0, 0.0, 0.0], 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a batch; one of fewer than four examples has no unbiased estimate, and is left out."""
        self._largest = max(self._largest, first.shape[1])
        if first.shape[1] < 4:
            return
        grams = [_gram(one) for one in (first, second)]
        for place, (one, other) in enumerate(((0, 1), (0, 0), (1, 1))):
            self._sums[place] += _hsic(grams[one], grams[other])

    def value(self) -> float:
        """1 for representations that are equal up to rotation, scale and shift; about 0 for unrelated ones."""
        if self._largest < 4:
            raise CalibrationError(f"cka: expected batches of 4 examples and more; got {self._largest}")
        both, first, second = self._sums
        return both / math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def _gram(activations: Tensor) -> Tensor:
    features = activations.movedim(1, 0).flatten(1).double()
    features = features - features.mean(0)  # HSIC is the same without; the numbers stay small
    return (features @ features.T).fill_diagonal_(0)


def _hsic(K: Tensor, L: Tensor) -> float:
    """The unbiased estimator of Song et al. (2012), Equation 5; both diagonals are zero."""
    n = len(K)
    rows_k, rows_l = K.sum(0), L.sum(0)
    value = (K * L).sum() + rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k @ rows_l) / (n - 2)
    return float(value) / (n * (n - 3))


class Procrustes:
    """Orthogonal Procrustes distance of centred activations of norm 1, from their summed cross-covariance."""

    def __init__(self) -> None:
        self._moments = CrossMoments()

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a batch."""
        self._moments.add(_rows(first), _rows(second))

    def value(self) -> float:
        """0 for representations that are equal up to rotation, scale and shift; at most sqrt(2)."""
        covariance = self._moments.covariance()
        norm = math.prod(math.sqrt(float(squares.sum())) for squares in self._moments.variances())
        if not norm:
            return math.nan
        # of an identity and C the rotation that maps one onto the other has trace(R^T C), the nuclear norm of C
        _, nuclear = orthogonal_procrustes(np.eye(len(covariance)), covariance.numpy())
        return math.sqrt(max(0.0, 2 - 2 * float(nuclear) / norm))


class Relative:
    """Relative representations: cosines with the examples of the first batch, the anchors, about their mean."""

    def __init__(self) -> None:
        self._anchors: tuple[Tensor, Tensor] | None = None
        self._means: tuple[Tensor, Tensor] | None = None
        self._total, self._count = 0.0, 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a batch; the first one gives the anchors, and counts too."""
        features = [one.movedim(1, 0).flatten(1).double() for one in (first, second)]
        if self._means is None:
            self._means = features[0].mean(0), features[1].mean(0)
        units = [_unit(one - mean) for one, mean in zip(features, self._means, strict=True)]
        if self._anchors is None:
            self._anchors = units[0], units[1]
        relative = [_unit(one @ anchors.T) for one, anchors in zip(units, self._anchors, strict=True)]
        self._total += float((relative[0] * relative[1]).sum())
        self._count += len(relative[0])

    def value(self) -> float:
        """The mean cosine of an example's two relative representations, at most 1."""
        return self._total / self._count


class Units:
    """The mean over units of the correlation of unit i of one network with unit i of the other."""

    def __init__(self) -> None:
        self._moments = CrossMoments()

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a batch."""
        self._moments.add(_rows(first), _rows(second))

    def value(self) -> float:
        """1 for units that respond alike one by one; a dead unit counts as 0."""
        return float(self._moments.correlation().diagonal().mean())


def _rows(activations: Tensor) -> Tensor:
    rows = activations.reshape(len(activations), -1)
    return rows if rows.dtype == torch.float64 else rows.float()


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, eps=torch.finfo(rows.dtype).tiny)


MEASURES: dict[str, Callable[[], Measure]] = {
    "correlation": Units,
    "cka": Cka,
    "procrustes": Procrustes,
    "relative": Relative,
}
