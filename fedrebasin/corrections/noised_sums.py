"""What a server makes of noised Gram matrices and normal equations: no more than what stands out of the noise.

Nodes state the standard deviations of their noise; where nothing stands out, corrections leave the merged model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.corrections.gram_sketch import Expanded
from fedrebasin.corrections.normal_equations import EXACT, Noise, NormalEquations
from fedrebasin.errors import RebasinError

#: in units of the norm that the noise has
NOISED_RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
#: minus the logarithm of the probability with which noise alone counts as a mean, or as a gain of one solution
_CHANCE = 10.0
#: standard deviations of the noise by which a solution must be better than none: a Gaussian's tail beyond s of them is
#: below exp(-s^2 / 2)
_SURE = math.sqrt(2 * _CHANCE)


def shrunk(noised: Tensor, noise: float) -> Tensor:
    """A noised vector as near to zero as its noise says.

    James and Stein's estimate, and zero where noise alone may be so long: the squares of m standard normal numbers sum
    to more than ``m + 2 sqrt(m t) + 2 t`` with a probability below exp(-t) (Laurent and Massart, 2000, lemma 1).

    >>> shrunk(torch.tensor([3.0, 4.0]), 0.0), shrunk(torch.tensor([3.0, 4.0]), 10.0)
    (tensor([3., 4.]), tensor([0., 0.]))
    """
    if not noise:
        return noised
    size = noised.numel()
    most = (size + 2 * math.sqrt(size * _CHANCE) + 2 * _CHANCE) * noise**2
    return noised * (1 - most / noised.square().sum()).clamp_min(0)


def without_negative(gram: Tensor, x: Tensor, count: float) -> Tensor:
    """The Gram matrix of which ``gram - x x^T / count`` has no negative eigenvalue, nearest in Frobenius norm.

    Examples
    --------
    >>> gram = torch.tensor([[3.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    >>> without_negative(gram, torch.tensor([2.0, 0.0], dtype=torch.float64), 2)
    tensor([[3., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    mean = torch.outer(x, x) / max(1, count)
    values, vectors = torch.linalg.eigh(gram - mean)
    nearest: Tensor = mean + (vectors * values.clamp_min(0)) @ vectors.T
    return nearest


def solve_noised(
    fit: NormalEquations, check: NormalEquations, ridge: float | None, *, intercept: bool
) -> tuple[NormalEquations, Tensor, Tensor]:
    """All the equations, without negative eigenvalues, and ``(D, d)`` as of :meth:`NormalEquations.solve`.

    Noise asks for larger ridges, in units of its own norm. The solutions on one part are tried on the other, which has
    noise of its own: what counts is the error plus 4.5 of its standard deviations, and the layer stays as it is where
    none is better than nothing by that. What was tried is kept, not solved again on both.
    """
    total = _positive(fit + check if check.count else fit)
    if ridge is not None or not (check.count and fit.count):
        return total, *total.solve(_ridge(total, NOISED_RIDGES[2]) if ridge is None else ridge, intercept=intercept)
    best, found, start = 0.0, (torch.zeros_like(total.cross), torch.zeros_like(total.e)), _positive(fit)
    for one in NOISED_RIDGES:
        D, d = start.solve(_ridge(start, one), intercept=intercept)
        bound = check.excess(D, d) + _SURE * _spread(check, D, d)
        if bound < best:
            best, found = bound, (D, d)
    return total, *found


def _spread(check: NormalEquations, D: Tensor, d: Tensor) -> float:
    """Standard deviation that the noise gives :meth:`NormalEquations.excess`."""
    gram, x, cross, e = check.noise
    parts = (
        math.sqrt(2) * gram * float((D.T @ D).norm()),
        2 * cross * float(D.norm()),
        2 * x * float((d @ D).norm()),
        2 * e * float(d.norm()),
    )
    return math.hypot(*parts) / max(1, check.count)


def _ridge(sums: NormalEquations, factor: float) -> float:
    """A multiple of the norm of the noise as ``solve`` takes it: in units of the mean variance."""
    variance = float(sums.covariance.diagonal().mean())
    return factor * 2 * sums.noise[0] * math.sqrt(len(sums.x)) / max(1, sums.count) / max(variance, 1e-30)


def read_noise(answer: Mapping[str, Tensor], name: str) -> Noise:
    """The standard deviations that a node states, 0 where it adds no noise.

    Raises
    ------
    RebasinError
        If they are not four finite numbers from 0.

    Examples
    --------
    >>> read_noise({}, "noise"), read_noise({"noise": torch.arange(4.0)}, "noise")
    ((0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 2.0, 3.0))
    """
    if name not in answer:
        return EXACT
    found = answer[name].flatten().tolist()
    if len(found) != 4 or not all(0 <= one < math.inf for one in found):
        raise RebasinError(f"{name!r} = {found[:4]}; four finite numbers from 0 are expected")
    gram, x, cross, e = found
    return gram, x, cross, e


def _positive(sums: NormalEquations) -> NormalEquations:
    """The same equations with a Gram matrix that inputs can have."""
    total = sums + NormalEquations()
    total.x, total.e = shrunk(sums.x, sums.noise[1]), shrunk(sums.e, sums.noise[3])
    total.gram = without_negative(sums.gram, total.x, sums.count)
    return total


def steadied(nodes: Sequence[Expanded]) -> Sequence[Mapping[str, Tensor]]:
    """Noised Gram matrices made fit for RegMean; the very same where none has noise.

    Each loses its negative eigenvalues, and all get the same ridge, in units of a sample's variance: the norm that the
    largest noise among them has, so that RegMean of nothing but noise is the average of the weights.
    """
    if not any(value for node in nodes for value, *_ in node.noise.values()):
        return nodes
    ridges = {}
    for name in nodes[0]:
        sizes = [(node.noise[name][0], node[name]) for node in nodes]
        ridges[name] = max(2 * noise * math.sqrt(len(gram) - 1) / float(gram[-1, -1]) for noise, gram in sizes)
    return [_Steadied(node, ridges) for node in nodes]


class _Steadied(Mapping[str, Tensor]):
    """One node's matrices, made one at a time."""

    def __init__(self, node: Expanded, ridges: Mapping[str, float]) -> None:
        self._node, self._ridges = node, ridges

    def __getitem__(self, name: str) -> Tensor:
        gram = self._node[name].clone()
        count, x = float(gram[-1, -1]), gram[-1, :-1]
        inner = gram[:-1, :-1]
        if self._node.noise[name][0]:
            x = shrunk(x, self._node.noise[name][1])
            gram[-1, :-1] = gram[:-1, -1] = x
            inner = without_negative(inner, x, count)
        eye = torch.eye(len(inner), dtype=gram.dtype, device=gram.device)
        gram[:-1, :-1] = inner + count * self._ridges[name] * eye
        return gram

    def __iter__(self) -> Iterator[str]:
        return iter(self._node)

    def __len__(self) -> int:
        return len(self._node)
