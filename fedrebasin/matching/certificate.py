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

from collections.abc import Mapping

import torch
from torch import Tensor

from fedrebasin.matching.plan import Block, Term, plan_of
from fedrebasin.spec import PermutationSpec

#: Squared distances come from a product, with this much rounding for each of the two squared norms (float32).
_ROUNDING = 1e-5
#: Columns that are tried first: a slab with at least ``_ENOUGH``, and the first ``_FEW`` of it.
_ENOUGH, _FEW = 64, 512
#: Entries of a difference that are made at once: a megabyte stays in a core's cache.
_PIECE = 2**18


class IdentityCertificate:
    """What a reference alone says, made when it is first needed and kept for every model that is compared with it.

    Permutations with families over them, and those on two axes of one tensor, are not assignments of single units:
    with one of them nothing is certified.
    """

    def __init__(
        self, spec: PermutationSpec, reference: Mapping[str, Tensor], *, device: torch.device | str | None = None
    ) -> None:
        self._plan, self._device = plan_of(spec), device
        self._reference = (
            reference if device is None else {name: reference[name].to(device) for name in self._plan.names}
        )
        self.possible = not self._plan.relative
        #: for each tensor the blocks that it speaks for, with the slab in which it does
        self._users: dict[str, list[tuple[Block, Term]]] = {}
        for block, found in self._plan.terms.items():
            for term in found:
                self._users.setdefault(term.name, []).append((block, term))
        self._margins: dict[tuple[Block, bool], Tensor] = {}
        self._bounds: dict[Block, Tensor] = {}

    def holds(self, model: Mapping[str, Tensor]) -> bool:
        """True if the identity is certainly the best order of every permutation's units, the others as they are."""
        if not self.possible:
            return False
        changes = self.changes(model)
        # a NaN fails every comparison
        open_blocks = [block for block, moved in changes.items() if not _all_within(moved, self._margin(block, True))]
        if any(not _all_within(changes[block], self._bound(block)) for block in open_blocks):
            return False
        return all(_all_within(changes[block], self._margin(block, False)) for block in open_blocks)

    def changes(self, model: Mapping[str, Tensor]) -> dict[Block, Tensor]:
        """How far each unit moved, ``|a_i - b_i|^2``, shape (units,) for each block; every tensor is read once."""
        result: dict[Block, Tensor] = {}
        for name, users in self._users.items():
            reference = self._wide(self._reference[name])
            model_tensor = self._wide(model[name]).to(reference)
            sums = _sums_of_squares(model_tensor, reference, sorted({term.dim for _, term in users if term.whole}))
            squares = None
            for block, term in users:
                if term.whole:
                    moved = sums[term.dim].reshape(-1, term.copies).sum(1)
                else:
                    squares = (model_tensor - reference).square_() if squares is None else squares
                    moved = term.rows(squares).sum(1)
                result[block] = result[block] + moved if block in result else moved
        return result

    def _margin(self, block: Block, some: bool) -> Tensor:
        """A fourth of each unit's squared distance, over some or all columns, to the nearest other; less rounding."""
        if (block, some) not in self._margins:
            terms, columns = self._plan.terms[block], None
            if some:
                terms, columns = [self._telling(terms)], _FEW
            rows = [term.rows(self._wide(self._reference[term.name]))[:, :columns] for term in terms]
            gram = sum(one @ one.T for one in rows)
            assert isinstance(gram, Tensor)
            norms = gram.diagonal()
            sums = norms.unsqueeze(0) + norms.unsqueeze(1)
            distances = sums - 2 * gram - _ROUNDING * sums
            distances.fill_diagonal_(float("inf"))
            self._margins[block, some] = distances.amin(1) / 4
        return self._margins[block, some]

    def _bound(self, block: Block) -> Tensor:
        """What no margin can exceed: ``|a_i - a_j| <= |a_i| + max |a|``."""
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
        tensor = tensor.detach() if self._device is None else tensor.detach().to(self._device)
        return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _all_within(moved: Tensor, margin: Tensor) -> bool:
    return bool((moved * (1 + _ROUNDING) <= margin).all())


def _sums_of_squares(model: Tensor, reference: Tensor, dims: list[int]) -> dict[int, Tensor]:
    """``(model - reference) ** 2`` summed over all axes but one, for each of ``dims``; in pieces that fit a cache."""
    if not dims:
        return {}
    length = model.shape[0]
    rows = max(1, _PIECE // max(1, model[0].numel()))
    piece = torch.empty((min(rows, length), *model.shape[1:]), dtype=model.dtype, device=model.device)
    found = {dim: model.new_zeros(model.shape[dim]) for dim in dims}
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        squares = torch.sub(model[start:stop], reference[start:stop], out=piece[: stop - start]).square_()
        if 0 in found:
            found[0][start:stop] = squares.flatten(1).sum(1) if squares.ndim > 1 else squares
        if dims[-1] > 0:
            over_rows = squares.sum(0)
            for dim in dims:
                if dim > 0:
                    found[dim] += _all_but(over_rows, dim - 1)
    return found


def _all_but(values: Tensor, dim: int) -> Tensor:
    return values.sum([other for other in range(values.ndim) if other != dim]) if values.ndim > 1 else values
