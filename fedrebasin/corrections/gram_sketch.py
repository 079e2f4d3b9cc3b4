"""A Gram matrix in fewer numbers: its means, its diagonal, and as many leading directions as a limit allows.

A Gram matrix ``G`` of inputs with a 1 below them is ``count`` times the mean's outer product plus the centred ``C``.
The sketch keeps count and mean, the ``rank`` leading eigenvectors of ``C`` scaled by the roots of their eigenvalues,
``U``, and the diagonal of ``C - U U^T``, so that every variance is exact and the matrix stays positive semi-definite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedrebasin.corrections.normal_equations import EXACT, Noise, pack, unpack
from fedrebasin.errors import RebasinError

_BYTES = 8
#: Directions beyond those wanted, and rounds, of the subspace iteration.
_SPARE, _ROUNDS = 8, 6

Sketch = dict[str, Tensor]


def rank_within(size: int, limit: int) -> int | None:
    """How many directions of a Gram matrix (size, size) fit into ``limit`` bytes; ``None``: all of it does.

    >>> rank_within(101, 10**6), rank_within(101, 4000), rank_within(101, 0)
    (None, 2, 0)
    """
    if size * (size + 1) // 2 * _BYTES <= limit:
        return None
    inputs = size - 1
    return max(0, (limit // _BYTES - 2 * inputs - 1) // max(1, inputs))


def sketch(gram: Tensor, rank: int | None) -> Sketch:
    """Reduce a Gram matrix whose last row belongs to the 1.

    Parameters
    ----------
    gram : Tensor, shape (m + 1, m + 1), float64
    rank : int or None
        ``None`` keeps the whole matrix, its upper triangle.

    Returns
    -------
    dict of str to Tensor
        ``gram``, or ``count`` (int64, 0-d), ``mean`` (m,), ``rest`` (m,) and ``directions`` (m, rank).

    Examples
    --------
    >>> X = torch.cat([torch.randn(5, 90).double(), torch.ones(1, 90).double()])
    >>> small = sketch(X @ X.T, 2)
    >>> bool(torch.allclose(expand(small, 6).diagonal(), (X @ X.T).diagonal()))
    True
    """
    if rank is None:
        return {"gram": pack(gram)}
    count, mean = gram[-1, -1], gram[:-1, -1] / gram[-1, -1]
    centred = gram[:-1, :-1] - count * torch.outer(mean, mean)
    directions = _leading(centred, min(rank, len(mean)))
    rest = (centred.diagonal() - directions.square().sum(1)).clamp_min(0)
    return {"count": count.round().long(), "mean": mean, "rest": rest, "directions": directions}


def expand(found: Sketch, size: int) -> Tensor:
    """The Gram matrix (size, size) of a sketch."""
    if "gram" in found:
        return unpack(found["gram"], size)
    count, mean, directions = found["count"].double(), found["mean"], found["directions"]
    gram = torch.empty(size, size, dtype=mean.dtype, device=mean.device)
    gram[:-1, :-1] = directions @ directions.T + found["rest"].diag() + count * torch.outer(mean, mean)
    gram[:-1, -1] = gram[-1, :-1] = count * mean
    gram[-1, -1] = count
    return gram


class Expanded(Mapping[str, Tensor]):
    """Gram matrices that are kept as sketches and expanded one at a time, when one is asked for.

    Examples
    --------
    >>> grams = Expanded({"weight": sketch(torch.eye(3).double(), None)}, {"weight": 3})
    >>> grams["weight"].shape
    torch.Size([3, 3])
    """

    def __init__(
        self, sketches: Mapping[str, Sketch], sizes: Mapping[str, int], noise: Mapping[str, Noise] | None = None
    ) -> None:
        self._sketches, self._sizes = sketches, sizes
        self.noise: dict[str, Noise] = dict.fromkeys(sketches, EXACT) if noise is None else dict(noise)

    def __getitem__(self, name: str) -> Tensor:
        return expand(self._sketches[name], self._sizes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)


def check_gram(gram: Tensor, *, noised: bool = False) -> None:
    """Refuse a matrix that no inputs have; noise may make such a one.

    Examples
    --------
    >>> check_gram(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    Traceback (most recent call last):
    ...
    fedrebasin.errors.RebasinError: a Gram matrix that no inputs have
    """
    if noised and float(gram[-1, -1]) > 0:
        return
    diagonal = gram.diagonal()
    # Cauchy and Schwarz, with room for products in single precision
    bound = 1.01 * diagonal.clamp_min(0) * gram[-1, -1] + 1e-6
    if not float(gram[-1, -1]) > 0 or bool((diagonal < 0).any()) or bool((gram[-1].square() > bound).any()):
        raise RebasinError("a Gram matrix that no inputs have")


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors times the roots of their eigenvalues, (m, rank), by subspace iteration."""
    size = len(symmetric)
    if not rank:
        return symmetric.new_zeros(size, 0)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, min(size, rank + _SPARE), generator=generator, device="cpu", dtype=symmetric.dtype)
    basis = torch.linalg.qr(start.to(symmetric.device)).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(symmetric @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ symmetric @ basis)
    found: Tensor = (basis @ vectors[:, -rank:]) * values[-rank:].clamp_min(0).sqrt()
    return found
