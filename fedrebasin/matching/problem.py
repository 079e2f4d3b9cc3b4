"""The weight-matching problem of one pair: similarity matrices, moves and the objective.

Index letters: i unit of the reference, j unit of the model, q another axis of the same tensor.

The similarity of a permutation's units is a sum of products, one for each tensor that it moves, and each product
depends on the other axes of that tensor alone. So the sum is kept, and mended by the difference of those indices
of other axes that have moved since.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor

from fedrebasin.matching.numbers import dot, like_of, norm_of
from fedrebasin.matching.plan import Block, Term, in_parts, plan_of
from fedrebasin.matching.products import Unfolded, add_product, reorder, reordered_dot
from fedrebasin.matching.shelf import Shelf
from fedrebasin.matching.side import side_of
from fedrebasin.perms import Perms, compose, identity_perms
from fedrebasin.permute import permute_tensor, source
from fedrebasin.spec import PermutationSpec
from fedrebasin.stored import StoredState, described

#: What is kept of a term in a similarity: the orders of the other axes that it was made with, and of a small tensor the
#: model's rows in these orders.
_Look = tuple[dict[int, Tensor], Tensor | None]
#: Tensors of up to so many entries are unfolded once, and multiplied whole.
_SMALL = 1 << 15


class WeightProblem:
    """A reference and a model that is permuted step by step; neither is copied.

    Where one of them is a :class:`StoredState`, tensors are read each time that they are used, and the similarities
    lie in files.

    Only parameters count: running statistics follow their units but do not vote. Similarities are kept in the
    tensors' own precision (float32 for narrower types), objectives in float64.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        reference: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        *,
        init: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        labels: tuple[str, str] = ("reference", "model"),
    ) -> None:
        for side, label in zip((reference, model), labels, strict=True):
            spec.check_state(described(side), label)
        self.spec = spec
        self.plan = plan_of(spec)
        self.blocks = self.plan.blocks
        self.scales = {
            name: norm_of(reference[name], name, labels[0]) * norm_of(model[name], name, labels[1])
            for name in self.plan.names
        }
        tensors = [side[name] for side in map(described, (reference, model)) for name in self.plan.names]
        self._like = like = like_of(tensors, sum(self.scales.values()), device)
        self.reference = side_of(reference, self.plan.names, like)
        self.model = side_of(model, self.plan.names, like)
        stored = next((state for state in (reference, model) if isinstance(state, StoredState)), None)
        self._constant: MutableMapping[Block, Tensor] = {} if stored is None else Shelf(stored.scratch)
        self._totals: MutableMapping[Block, Tensor] = {} if stored is None else Shelf(stored.scratch)
        self._kept: dict[Block, dict[int, _Look]] = {}
        self._unfolded: dict[Term, Unfolded] = {}
        self._small = _SMALL if stored is None else 0
        self._orders: dict[tuple[str, int], Tensor] = {}
        self.reset(init)

    @property
    def dtype(self) -> torch.dtype:
        """Of the similarities."""
        return self._like.dtype

    def reset(self, init: Mapping[str, Tensor] | None = None) -> None:
        """Start again from ``init``, or from the identity."""
        self.perms: Perms = identity_perms(self.spec) if init is None else {k: v.cpu().clone() for k, v in init.items()}
        self._orders.clear()
        self._kept.clear()
        self._moved = init is not None

    def forget(self) -> None:
        """Drop what is kept of the similarities, after a change of ``reference``."""
        self._constant.clear()
        self._totals.clear()
        self._kept.clear()
        self._unfolded.clear()

    def scale(self, block: Block) -> float:
        """|reference| |model| over the block's tensors: what the similarities are measured by."""
        return sum(self.scales[name] for name in self.plan.tensors[block])

    def entries(self, block: Block) -> list[int]:
        """The sizes of the block's tensors."""
        return [self.entries_of(name) for name in self.plan.tensors[block]]

    def entries_of(self, name: str) -> int:
        """The size of a tensor."""
        return math.prod(self.spec.shapes[name])

    def similarity(self, block: Block, names: set[str] | None = None) -> Tensor:
        """``similarity[i, j]`` of the reference's units with the model's: ``(n, n)``, on the CPU, not to be edited.

        Over the tensors ``names`` only, if given. Column ``j`` is the model's own unit ``j`` for a plain
        permutation; for a row of a family, and the permutation that it is over, unit ``j`` of the current order.
        """
        terms = [(k, term) for k, term in enumerate(self.plan.terms[block]) if names is None or term.name in names]
        if block in self.plan.relative:
            return sum([self._product(block, term) for _, term in terms], self._empty(block)).cpu()
        if names is not None or block not in self._kept:
            self._kept[block], total = {}, self._constant_part(block).clone()
        else:
            total = self._totals[block]
        others = []
        for index, term in terms:
            if term.name not in self.plan.simple:
                others.append(self._product(block, term))
            elif term.name not in self.plan.alone[block]:
                self._mend(total, self._kept[block], index, term)
        self._totals[block] = total
        return sum(others, total).cpu()

    def _empty(self, block: Block) -> Tensor:
        return self._like.new_zeros(block.size, block.size)

    def _constant_part(self, block: Block) -> Tensor:
        """What biases, norms and tensors without other permutations say: it never changes."""
        if block not in self._constant:
            terms = [term for term in self.plan.terms[block] if term.name in self.plan.alone[block]]
            total = self._empty(block)
            for part in in_parts(terms, self.entries_of):
                if len(part) == 1:
                    (term,) = part
                    add_product(total, term, self.reference[term.name], self.model[term.name], {}, None)
                else:
                    first, second = (
                        torch.cat([term.rows(side[term.name]) for term in part], 1)
                        for side in (self.reference, self.model)
                    )
                    total.addmm_(first, second.T)
            self._constant[block] = total
        return self._constant[block]

    def _product(self, block: Block, term: Term) -> Tensor:
        """A product that is made anew each time: a perm on both axes, families, and what depends on their rows."""
        perms = dict(self.perms)
        if block not in self.plan.relative:
            del perms[block.perm]
        moved = permute_tensor(self.spec.axes[term.name], perms, self.model[term.name])
        return term.rows(self.reference[term.name]) @ term.rows(moved).T

    def _mend(self, total: Tensor, kept: dict[int, _Look], index: int, term: Term) -> None:
        """Bring one term of a kept similarity up to the current orders of the tensor's other axes."""
        new = self.other_orders(term)
        old, rows = kept.get(index, (None, None))
        if old is not None and all(order is old[dim] for dim, order in new.items()):
            return
        if self._is_small(term):
            if term not in self._unfolded:
                self._unfolded[term] = Unfolded(term, self.reference[term.name], self.model[term.name])
            rows = self._unfolded[term].add_product(total, new, rows)
        else:
            add_product(total, term, self.reference[term.name], self.model[term.name], new, old)
        kept[index] = new, rows

    def _is_small(self, term: Term) -> bool:
        return term.whole and term.copies == 1 and self.entries_of(term.name) <= self._small

    def other_orders(self, term: Term) -> dict[int, Tensor]:
        """The current orders of the other axes of a term's tensor that some permutation moves."""
        return {dim: self.order(term.name, dim) for dim in self.plan.moved_dims[term.name] if dim != term.dim}

    def reordered(self, name: str, orders: Mapping[int, Tensor]) -> Tensor:
        """A tensor of the model with these axes in other orders."""
        return reorder(self.model[name], orders)

    def order(self, name: str, dim: int) -> Tensor:
        """Old index for every new index along an axis, under the current permutations."""
        key = (name, dim)
        if key not in self._orders:
            layout = self.spec.axes[name][dim]
            plain = self.plan.whole.get(layout)
            self._orders[key] = self.perms[plain] if plain is not None else source(layout, self.perms, {})
        return self._orders[key]

    def _orders_of(self, name: str) -> dict[int, Tensor]:
        return {dim: self.order(name, dim) for dim in self.plan.moved_dims[name]}

    def unfolded(self, block: Block, names: set[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Reference and current model as matrices with one row for each unit of the block, for each of ``names``."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for term in self.plan.terms[block]:
            if term.name in names:
                pair = term.rows(self.reference[term.name]), term.rows(self.current(term.name))
                found.setdefault(term.name, []).append(pair)
        return found

    def current(self, name: str) -> Tensor:
        """A tensor of the model under the current permutations; the model's own where nothing has moved."""
        if not self._moved:
            return self.model[name]
        if name in self.plan.simple:
            return reorder(self.model[name], self._orders_of(name))
        return permute_tensor(self.spec.axes[name], self.perms, self.model[name])

    def move(self, steps: Perms) -> None:
        """Permute the current model's units: ``new[i] = current[step[i]]``."""
        self.put(compose(self.spec, self.perms, {**identity_perms(self.spec), **steps}), steps)

    def put(self, perms: Mapping[str, Tensor], changed: Iterable[str]) -> None:
        """Set the permutations ``changed`` to what ``perms`` says."""
        for perm in changed:
            self.perms[perm], self._moved = perms[perm], True
            for axis in self.plan.axes_of[perm]:
                self._orders.pop(axis, None)

    def steps(self, block: Block, step: Tensor) -> Perms:
        """The permutations that move the units of one block."""
        if block.row is None:
            return {block.perm: step}
        rows = torch.arange(block.size, device="cpu").expand(self.spec.perm_shapes[block.perm]).clone()
        rows[block.row] = step
        return {block.perm: rows}

    def names_of(self, perms: Iterable[str]) -> set[str]:
        """The parameters that these permutations move."""
        return {name for perm in perms for name, _ in self.plan.axes_of[perm] if name in self.reference}

    def objective(self, names: Iterable[str] | None = None) -> float:
        """The sum of <reference, current model> over the tied parameters, or over ``names``, summed in float64."""
        return sum(map(self._share, self.plan.names if names is None else sorted(names)))

    def _share(self, name: str) -> float:
        if name in self.plan.simple and self._moved:
            return reordered_dot(self.reference[name], self.model[name], self._orders_of(name))
        return dot(self.reference[name], self.current(name))
