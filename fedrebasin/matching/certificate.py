"""A proof that no single permutation improves a model near its reference, in time linear in the parameters.

Index letters: i, j units of one permutation; a_i the reference's weights at unit i, b_i the model's.

If every unit moved by at most half of the distance to the nearest other unit of the reference,
``|a_i - b_i| <= min_j |a_i - a_j| / 2``, then ``|a_i - b_j| >= |a_i - a_j| - |a_j - b_j| >= |a_j - b_j|``
for all i and j, so that no assignment has a smaller ``sum_i |a_i - b_p(i)|^2`` than the identity, or a larger
``sum_i <a_i, b_p(i)>``.

A distance over some of the columns is at most the distance over all, so that a few columns of the reference prove
most cases; all of them are multiplied only where these do not decide, and where all could.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock

import torch
from torch import Tensor

from fedrebasin.matching.numbers import as_real
from fedrebasin.matching.plan import Block, Term, plan_of
from fedrebasin.matching.products import cut
from fedrebasin.spec import PermutationSpec

#: Squared distances come from a product, with this much rounding for each of the two squared norms (float32).
_ROUNDING = 1e-5
#: Columns that are tried first: a slab with at least ``_ENOUGH``, and the first ``_FEW`` of it.
_ENOUGH, _FEW = 64, 512
#: Entries of a difference that are made at once: a megabyte stays in a core's cache.
_PIECE = 2**18
#: Squares of entries that are all below this leave float32.
_SMALL = 1e-12


def margins_of(gram: Tensor) -> Tensor:
    """A fourth of each unit's squared distance to the nearest other, less rounding, from the products of all units."""
    norms = gram.diagonal()
    nearest = []
    for piece in cut(len(gram), len(gram)):  # four matrices of their size are made on the way
        sums = norms.unsqueeze(0) + norms[piece].unsqueeze(1)
        distances = sums - 2 * gram[piece] - _ROUNDING * sums
        distances.diagonal(piece.start).fill_(float("inf"))
        nearest.append(distances.amin(1) / 4)
    return torch.cat(nearest)


class IdentityCertificate:
    """What a reference alone says, made when it is first needed and kept for every model that is compared with it.

    Permutations with families over them, and those on two axes of one tensor, are not assignments of single units:
    with one of them nothing is certified, and neither where all weights are so small that their squares vanish.
    """

    def __init__(
        self, spec: PermutationSpec, reference: Mapping[str, Tensor], *, device: torch.device | str | None = None
    ) -> None:
        self._plan, self._device = plan_of(spec), device
        self._reference = (
            reference if device is None else {name: reference[name].to(device) for name in self._plan.names}
        )
        largest = max((_largest(self._reference[name]) for name in self._plan.names), default=0.0)
        self.possible = not (self._plan.relative or 0 < largest < _SMALL)
        #: for each tensor the blocks that it speaks for, with the slab in which it does
        self._users: dict[str, list[tuple[Block, Term]]] = {}
        for block, found in self._plan.terms.items():
            for term in found:
                self._users.setdefault(term.name, []).append((block, term))
        self._margins: dict[tuple[Block, bool], Tensor] = {}
        self._bounds: dict[Block, Tensor] = {}
        self._lock = Lock()  # several models may be looked at together: what a reference says is made once

    def holds(self, model: Mapping[str, Tensor]) -> bool:
        """True if the identity is certainly the best order of every permutation's units, the others as they are."""
        return self.holds_each([model])[0]

    def holds_each(self, models: Sequence[Mapping[str, Tensor]]) -> list[bool]:
        """The same for several models in less time: each piece of the reference is read once for all of them."""
        if not self.possible or not models:
            return [False] * len(models)
        changes = self.changes(models)
        # a NaN fails every comparison
        few = {block: _all_within(moved, self._margin(block, True)) for block, moved in changes.items()}
        held = torch.ones(len(models), dtype=torch.bool, device="cpu")
        for block, within in few.items():
            if not within.all():
                held &= within | _all_within(changes[block], self._bound(block))
        for block, within in few.items():
            if (held & ~within).any():
                held &= within | _all_within(changes[block], self._margin(block, False))
        return [bool(one) for one in held]

    def changes(self, models: Sequence[Mapping[str, Tensor]]) -> dict[Block, Tensor]:
        """How far each unit of each model moved, ``|a_i - b_i|^2``, shape (models, units) for each block."""
        found: dict[Block, Tensor] = {}
        for name, users in self._users.items():
            reference, tensors = self._wide(self._reference[name]), [as_real(model[name]) for model in models]
            dims = sorted({term.dim for _, term in users if term.whole})
            sums = _sums_of_squares(tensors, reference, dims) if dims else {}
            parts = _sums_of_slabs(tensors, reference, [term for _, term in users if not term.whole])
            for block, term in users:
                if term.whole:
                    moved = sums[term.dim].reshape(len(models), -1, term.copies)
                    moved = moved[:, :, 0] if term.copies == 1 else moved.sum(2)
                else:
                    moved = parts[term]
                found[block] = found[block] + moved if block in found else moved
        return found

    def _margin(self, block: Block, some: bool) -> Tensor:
        """A fourth of each unit's squared distance, over some or all columns, to the nearest other; less rounding."""
        with self._lock:
            if (block, some) not in self._margins:
                self._margins[block, some] = self._find_margin(block, some)
        return self._margins[block, some]

    def _find_margin(self, block: Block, some: bool) -> Tensor:
        terms, columns = self._plan.terms[block], None
        if some:
            terms, columns = [self._telling(terms)], _FEW
        rows = [term.rows(self._wide(self._reference[term.name]))[:, :columns] for term in terms]
        gram = rows[0] @ rows[0].T
        for one in rows[1:]:
            gram += one @ one.T
        return margins_of(gram)

    def _bound(self, block: Block) -> Tensor:
        """What no margin can exceed: ``|a_i - a_j| <= |a_i| + max |a|``."""
        with self._lock:
            if block not in self._bounds:
                squares = [t.rows(self._wide(self._reference[t.name])).square().sum(1) for t in self._plan.terms[block]]
                norms = torch.stack(squares).sum(0).sqrt()
                self._bounds[block] = (norms + norms.max()).square() / 4
        return self._bounds[block]

    def _telling(self, terms: list[Term]) -> Term:
        """The slab with fewest columns of those that have enough to tell units apart, or the one with most."""
        sizes = {
            term: self._reference[term.name].numel() // self._reference[term.name].shape[term.dim] for term in terms
        }
        enough = [term for term in terms if sizes[term] >= _ENOUGH]
        return min(enough, key=sizes.__getitem__) if enough else max(terms, key=sizes.__getitem__)

    def _wide(self, tensor: Tensor) -> Tensor:
        tensor = as_real(tensor if self._device is None else tensor.to(self._device))
        return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _largest(tensor: Tensor) -> float:
    """The largest absolute value of an entry, 0 if there is none."""
    tensor = as_real(tensor)
    tensor = tensor if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor.double()
    return max(abs(float(end)) for end in tensor.aminmax()) if tensor.numel() else 0.0


def _all_within(moved: Tensor, margin: Tensor) -> Tensor:
    """For each model, on the CPU."""
    return (moved * (1 + _ROUNDING) <= margin).all(1).cpu()


def _sums_of_slabs(models: Sequence[Tensor], reference: Tensor, terms: list[Term]) -> dict[Term, Tensor]:
    """``(model - reference) ** 2``, summed over the columns of each slab: shape (models, units), a model at a time."""
    found: dict[Term, list[Tensor]] = {term: [] for term in terms}
    for model in models if terms else ():
        squares = (model.to(reference) - reference).square_()
        for term in terms:
            found[term].append(term.rows(squares).sum(1))
    return {term: torch.stack(sums) for term, sums in found.items()}


def _sums_of_squares(models: Sequence[Tensor], reference: Tensor, dims: list[int]) -> dict[int, Tensor]:
    """``(model - reference) ** 2``, summed over all axes but one, for each of ``dims``: shape (models, its length).

    Small tensors of all models together; large ones in pieces that fit a cache, one piece of all models after the
    other.
    """
    if reference.numel() <= _PIECE:
        at_once = max(1, _PIECE // max(1, reference.numel()))
        groups = [models[start : start + at_once] for start in range(0, len(models), at_once)]
        every = [torch.stack([model.to(reference) for model in group]).sub_(reference).square_() for group in groups]
        return {dim: torch.cat([_all_but(squares, dim) for squares in every]) for dim in dims}
    shape, rows = reference.shape, max(1, _PIECE // reference[0].numel())
    reference = reference.reshape(shape[0], -1)
    models = [model.reshape(shape[0], -1) for model in models]
    over_columns = reference.new_empty(len(models), shape[0])
    over_rows = reference.new_zeros(len(models), reference.shape[1])
    piece, sums = torch.empty_like(reference[:rows]), torch.empty_like(reference[0])
    for start in range(0, shape[0], rows):
        here = reference[start : start + rows]
        squares = piece[: len(here)]
        for model, columns, total in zip(models, over_columns, over_rows, strict=True):
            torch.sub(model[start : start + rows].to(here), here, out=squares)
            torch.mul(squares, squares, out=squares)
            if 0 in dims:
                torch.sum(squares, 1, out=columns[start : start + rows])
            if dims[-1] > 0:
                total += torch.sum(squares, 0, out=sums)
    rest = over_rows.reshape(len(models), *shape[1:])
    return {dim: over_columns if dim == 0 else _all_but(rest, dim - 1) for dim in dims}


def _all_but(values: Tensor, dim: int) -> Tensor:
    """For each model the sum over all its axes but one; the outer ones first, whole rows at a time."""
    for _ in range(dim):
        values = values.sum(1)
    return values.flatten(2).sum(2) if values.ndim > 2 else values
