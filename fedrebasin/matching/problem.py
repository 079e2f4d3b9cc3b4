"""The weight-matching problem of one pair: similarity matrices, moves and the objective.

Index letters: i unit of the reference, j unit of the model, q another axis of the same tensor.

The similarity of a permutation's units is a sum of products, one for each tensor that it moves, and each product
depends on the other axes of that tensor alone. So products are kept, and made again only where another axis has
moved since; where few of its units have, the old product is mended by the difference of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.matching.plan import Block, Term, plan_of
from fedrebasin.perms import Perms, compose, identity_perms
from fedrebasin.permute import permute_tensor, source
from fedrebasin.spec import PermutationSpec

#: A product is mended if fewer than this share of another axis's indices have moved.
_FEW = 0.5
#: Below this number of entries a product is made again rather than mended.
_SMALL = 1 << 16


@dataclass
class _Product:
    """A term's product, and the orders of the other axes that it was made with."""

    similarity: Tensor
    orders: dict[int, Tensor]


class WeightProblem:
    """A reference and a model that is permuted step by step; neither is copied.

    Only parameters count: running statistics follow their units but do not vote. Products are taken in the
    tensors' own precision (float32 for narrower types), sums and assignments in float64.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        reference: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        *,
        init: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        spec.check_state(reference, "reference")
        spec.check_state(model, "model")
        self.spec = spec
        self.plan = plan_of(spec)
        self.blocks = self.plan.blocks
        self.reference = {name: _prepare(reference[name], device) for name in self.plan.names}
        self.model = {name: _prepare(model[name], device) for name in self.plan.names}
        self._scales = {
            name: _norm(self.reference[name], name, "reference") * _norm(self.model[name], name, "model")
            for name in self.plan.names
        }
        self._constant: dict[Block, Tensor] = {}
        self._products: dict[tuple[Block, str], list[_Product]] = {}
        self._orders: dict[tuple[str, int], Tensor] = {}
        self.reset(init)

    def reset(self, init: Mapping[str, Tensor] | None = None) -> None:
        """Start again from ``init``, or from the identity."""
        self.perms: Perms = identity_perms(self.spec) if init is None else {k: v.cpu().clone() for k, v in init.items()}
        self._orders.clear()
        self._moved = init is not None

    def scale(self, block: Block) -> float:
        """|reference| |model| over the block's tensors: what the similarities are measured by."""
        return sum(self._scales[name] for name in self.plan.tensors[block])

    def entries(self, block: Block) -> list[int]:
        """The sizes of the block's tensors."""
        return [self.reference[name].numel() for name in self.plan.tensors[block]]

    def similarity(self, block: Block, names: set[str] | None = None) -> Tensor:
        """``similarity[i, j]`` of the reference's units with the model's: float64 ``(n, n)``, on the CPU.

        Over the tensors ``names`` only, if given. Column ``j`` is the model's own unit ``j`` for a plain
        permutation; for a row of a family, and the permutation that it is over, unit ``j`` of the current order.
        """
        total = torch.zeros(block.size, block.size, dtype=torch.float64)
        if block not in self.plan.relative and (names is None or self.plan.alone[block] <= names):
            total += self._constant_part(block)
            names = (
                set(self.plan.tensors[block]) - self.plan.alone[block]
                if names is None
                else names - self.plan.alone[block]
            )
        for name in self.plan.tensors[block]:
            if names is None or name in names:
                for product in self._similarity_of(block, name):
                    total += product.cpu()
        return total

    def _constant_part(self, block: Block) -> Tensor:
        """What biases, norms and tensors without other permutations say: it never changes."""
        if block not in self._constant:
            rows = [
                [term.rows(side[term.name]) for term in self.plan.terms[block] if term.name in self.plan.alone[block]]
                for side in (self.reference, self.model)
            ]
            empty = torch.zeros(block.size, block.size, dtype=torch.float64)
            self._constant[block] = (
                (torch.cat(rows[0], 1) @ torch.cat(rows[1], 1).T).double().cpu() if rows[0] else empty
            )
        return self._constant[block]

    def _similarity_of(self, block: Block, name: str) -> list[Tensor]:
        terms = [term for term in self.plan.terms[block] if term.name == name]
        if block in self.plan.relative or name not in self.plan.simple:
            perms = dict(self.perms)
            if block not in self.plan.relative:
                del perms[block.perm]
            moved = permute_tensor(self.spec.axes[name], perms, self.model[name])
            return [term.rows(self.reference[name]) @ term.rows(moved).T for term in terms]
        kept = self._products.setdefault((block, name), [])
        for index, term in enumerate(terms):
            orders = {dim: self.order(name, dim) for dim in self.plan.moved_dims[name] if dim != term.dim}
            if index == len(kept):
                kept.append(_Product(self._product(term, orders), orders))
            else:
                self._mend(kept[index], term, orders)
        found = [product.similarity for product in kept]
        if self.model[name].numel() * 2 < block.size**2:  # cheaper to make again than to hold
            del self._products[block, name]
        return found

    def _mend(self, product: _Product, term: Term, orders: dict[int, Tensor]) -> None:
        changed = [dim for dim, order in orders.items() if order is not product.orders[dim]]
        if changed and self.model[term.name].numel() < _SMALL:
            product.similarity, product.orders = self._product(term, orders), orders
            return
        moved = {dim: (orders[dim] != product.orders[dim]).nonzero().squeeze(1) for dim in changed}
        moved = {dim: where for dim, where in moved.items() if len(where)}
        if not moved:
            return
        (dim, where), *others = moved.items()
        if others or len(where) > _FEW * len(orders[dim]):
            product.similarity = self._product(term, orders)
        else:
            fixed = {other: order for other, order in orders.items() if other != dim}
            where = where.to(self.reference[term.name].device)
            model, old, new = self.model[term.name], product.orders[dim].to(where.device), orders[dim].to(where.device)
            change = model.index_select(dim, new[where]) - model.index_select(dim, old[where])
            reference = self.reference[term.name].index_select(dim, where)
            product.similarity += term.rows(reference) @ term.rows(_reorder(change, fixed)).T
        product.orders = orders

    def _product(self, term: Term, orders: dict[int, Tensor]) -> Tensor:
        return term.rows(self.reference[term.name]) @ term.rows(_reorder(self.model[term.name], orders)).T

    def order(self, name: str, dim: int) -> Tensor:
        """Old index for every new index along an axis, under the current permutations."""
        key = (name, dim)
        if key not in self._orders:
            layout = self.spec.axes[name][dim]
            plain = self.plan.whole.get(layout)
            self._orders[key] = self.perms[plain] if plain is not None else source(layout, self.perms, {})
        return self._orders[key]

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
            return _reorder(self.model[name], {dim: self.order(name, dim) for dim in self.plan.moved_dims[name]})
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
        rows = torch.arange(block.size).expand(self.spec.perm_shapes[block.perm]).clone()
        rows[block.row] = step
        return {block.perm: rows}

    def names_of(self, perms: Iterable[str]) -> set[str]:
        """The parameters that these permutations move."""
        return {name for perm in perms for name, _ in self.plan.axes_of[perm] if name in self.reference}

    def objective(self, names: Iterable[str] | None = None) -> float:
        """The sum of <reference, current model> over the tied parameters, or over ``names``; exact in float64."""
        chosen = self.plan.names if names is None else sorted(names)
        return sum(_dot(self.reference[name], self.current(name)) for name in chosen)


def _reorder(tensor: Tensor, orders: Mapping[int, Tensor]) -> Tensor:
    for dim, order in orders.items():
        tensor = tensor.index_select(dim, order.to(tensor.device))
    return tensor


def _prepare(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    tensor = tensor.detach()
    if device is not None:
        tensor = tensor.to(device)
    return (
        tensor.float() if not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    )


def _norm(tensor: Tensor, name: str, label: str) -> float:
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if not math.isfinite(norm):
        raise SpecMismatchError(
            f"{label}: {name!r} holds a NaN, an infinity or numbers whose squares overflow; leave this model out"
        )
    return norm


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum(dtype=torch.float64))
