"""How alike the units of two networks are over data: correlations of activations, streamed batch by batch.

Index letters: i unit of the reference, j of the model, n observation (example, pixel, step, copy of the unit).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin.coefficients import single
from fedrebasin.layout import Free, Layout, Sum, leaves, units, unknown_outers
from fedrebasin.spec import PermutationSpec

#: A unit is dead if its standard deviation is below this share of the place's largest, or of its own mean.
_DEAD = 1e-6


@dataclass(frozen=True, eq=False)
class Part:
    """The units of one permutation along one axis of activations.

    ``perm`` is a permutation, all rows of a family whose outer leaf is free (units row after row), or, with ``row``,
    one row of a family over a fixed leaf. ``index`` holds the places along the axis, the copies of a unit together.
    """

    perm: str
    row: int | None
    units: int
    index: Tensor

    def rows(self, activations: Tensor) -> Tensor:
        """A matrix with a row for each unit, at least float32; its memory may be the activations' own."""
        if not torch.equal(self.index, torch.arange(len(activations), device="cpu")):
            activations = activations.index_select(0, self.index.to(activations.device))
        return single(activations.reshape(self.units, -1))

    def order(self, spec: PermutationSpec, perms: Mapping[str, Tensor]) -> Tensor:
        """Which row comes where when the network is permuted: ``rows(permuted)[i] = rows(original)[order[i]]``."""
        perm = perms[self.perm]
        if perm.ndim == 1:
            return perm
        if self.row is not None:
            return perm[self.row]
        outer, size = perms[spec.over[self.perm]], perm.shape[1]
        return (outer.unsqueeze(1) * size + perm).flatten()


def parts_of(spec: PermutationSpec, layout: Layout) -> list[Part]:
    """What an axis of activations says about each permutation; side by side parts speak for themselves.

    An outer permutation is left out where a family over it lies, which says more.

    >>> from fedrebasin.layout import Fixed, Product
    >>> spec = PermutationSpec({"w": (Product((Free("c", 2), Fixed(3))),)})
    >>> [(part.perm, part.units, part.index.tolist()) for part in parts_of(spec, spec.axes["w"][0])]
    [('c', 2, [0, 1, 2, 3, 4, 5])]
    """
    found = []
    for start, piece in _pieces(layout, 0):
        if next(unknown_outers(piece, {}), None) is not None:
            continue  # its order depends on an axis that is not known here
        perms = dict.fromkeys(leaf.perm for leaf in leaves(piece) if isinstance(leaf, Free))
        for perm in perms:
            outer = spec.over.get(perm)
            if outer is None:
                if not any(spec.over.get(other) == perm for other in perms):
                    found.append(Part(perm, None, spec.perm_shapes[perm][0], start + _places(piece, perm)))
                continue
            count, size = spec.perm_shapes[perm]
            rows = [start + _places(piece, perm, row) for row in range(count)]
            if outer in spec.perm_shapes:
                found.append(Part(perm, None, count * size, torch.cat(rows)))
            else:
                found += [Part(perm, row, size, index) for row, index in enumerate(rows) if len(index)]
    return found


def _pieces(layout: Layout, start: int) -> Iterator[tuple[int, Layout]]:
    if not isinstance(layout, Sum):
        yield start, layout
        return
    for part in layout.parts:
        yield from _pieces(part, start)
        start += part.size


def _places(layout: Layout, perm: str, row: int | None = None) -> Tensor:
    unit = units(layout, perm, row=row)
    where = (unit >= 0).nonzero().squeeze(1)
    return where[unit[where].argsort(stable=True)]


class CrossMoments:
    """Means and sums of squared and crossed deviations of two sets of units, merged batch by batch in float64.

    Products within a batch are taken in the activations' own precision, about the batch's means.

    Examples
    --------
    >>> moments = CrossMoments()
    >>> moments.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 3.0], [4.0, 4.0]]))
    >>> moments.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -1.0], [4.0, 4.0]]))
    >>> moments.correlation()
    tensor([[-1.,  0.]], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.count = 0
        self._means = (torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu"))
        self._squares = (torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu"))
        self._crossed = torch.zeros(0, device="cpu")

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add observations, shape ``(units, n)`` each (Chan, Golub and LeVeque's update)."""
        count = first.shape[1]
        if count == 0:
            return
        means = first.mean(1, dtype=torch.float64), second.mean(1, dtype=torch.float64)
        centred = [rows - mean.to(rows.dtype).unsqueeze(1) for rows, mean in zip((first, second), means, strict=True)]
        squares = [rows.square().sum(1, dtype=torch.float64) for rows in centred]
        crossed = (centred[0] @ centred[1].T).double()
        if self.count == 0:
            self.count, self._means, self._crossed = count, means, crossed
            self._squares = (squares[0], squares[1])
            return
        total = self.count + count
        share = self.count * count / total
        steps = [new - old for new, old in zip(means, self._means, strict=True)]
        self._crossed += crossed.addr_(steps[0], steps[1], alpha=share)
        for old, new, step in zip(self._squares, squares, steps, strict=True):
            old.add_(new).add_(step.square(), alpha=share)
        for old, step in zip(self._means, steps, strict=True):
            old.add_(step, alpha=count / total)
        self.count = total

    @property
    def finite(self) -> bool:
        """False if any observation was NaN or infinite, or too large to square."""
        return all(bool(sums.isfinite().all()) for sums in (*self._means, *self._squares, self._crossed))

    def covariance(self) -> Tensor:
        """Sums of crossed deviations of every pair of units, on the CPU."""
        return self._crossed.cpu()

    def variances(self) -> tuple[Tensor, Tensor]:
        """Sums of squared deviations of every unit, for both sets."""
        return self._squares

    def correlation(self) -> Tensor:
        """Pearson's correlation of every pair of units, on the CPU; 0 for dead units."""
        inverse = []
        for mean, squares in zip(self._means, self._squares, strict=True):
            std = (squares / max(1, self.count)).sqrt()
            alive = (std > _DEAD * std.max()) & (std > _DEAD * mean.abs())
            inverse.append(torch.where(alive, squares.rsqrt(), 0.0))
        return (self._crossed * inverse[0].unsqueeze(1) * inverse[1]).cpu()
