"""A tensor's share of a similarity or of the objective, piece by piece: no copy of a large one in another order."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fedrebasin.matching.numbers import PIECE, dot
from fedrebasin.matching.plan import Term

Orders = Mapping[int, Tensor]


class Unfolded:
    """A small term's two tensors as matrices with a row for each unit, made once.

    Parameters
    ----------
    term : Term
    reference, model : Tensor
        Of one shape.
    """

    def __init__(self, term: Term, reference: Tensor, model: Tensor) -> None:
        self._dim = term.dim
        self._first = term.rows(reference).contiguous()
        self._front = model.movedim(term.dim, 0).contiguous()

    def add_product(self, total: Tensor, new: Orders, old: Tensor | None) -> Tensor:
        """:func:`add_product`, less a product with what the last look returned, ``old``."""
        moved = self._front
        for dim, order in new.items():
            moved = moved.index_select(dim + (dim < self._dim), order.to(moved.device))
        rows = moved.reshape(len(moved), -1)
        total.addmm_(self._first, (rows if old is None else rows - old).T)
        return rows


def add_product(total: Tensor, term: Term, reference: Tensor, model: Tensor, new: Orders, old: Orders | None) -> None:
    """Add to ``total`` the products of a slab's rows with those of the model in ``new`` orders, less the ``old`` ones'.

    Parameters
    ----------
    total : Tensor, shape (units, units)
        Edited in place.
    term : Term
    reference, model : Tensor
        Of one shape.
    new, old : dict of int to Tensor
        For the axes beside the term's own the old index of every new one; where one axis differs, only what
        differs on it is multiplied.
    """
    free = set(range(model.ndim)) - {term.dim, *(dim for dim, _ in term.within)}
    if not free or (not new and term.whole and term.dim == 0):  # nothing is in another order, and no row is copied
        total.addmm_(term.rows(reference), term.rows(model).T)
        return
    every = [new] if old is None else [new, old]
    changed = [] if old is None else [dim for dim, order in new.items() if order is not old[dim]]
    if old is not None and len(changed) == 1:
        (axis,) = changed
        where = (new[axis] != old[axis]).nonzero().squeeze(1)
        every = [{**orders, axis: orders[axis][where]} for orders in every]
        length, here = len(where), {axis: where}
    else:
        axis, here = max(free, key=lambda dim: model.shape[dim]), {}
        length = model.shape[axis]
    for piece in cut(length, model.numel() // model.shape[axis]):
        change, *less = [_part(model, axis, piece, orders) for orders in every]
        for other in less:
            change = change.sub_(other)
        total.addmm_(term.rows(_part(reference, axis, piece, here)), term.rows(change).T)


def reordered_dot(reference: Tensor, model: Tensor, orders: Orders) -> float:
    """The sum of products of the reference's entries with those of the model in these orders, in float64.

    >>> import torch
    >>> reordered_dot(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), {0: torch.tensor([1, 0])})
    10.0
    """
    if model.numel() <= PIECE:
        return dot(reference, reorder(model, orders))
    pieces = cut(len(model), model[0].numel())
    return math.fsum(dot(reference[piece], _part(model, 0, piece, orders)) for piece in pieces)


def cut(length: int, entries: int) -> list[slice]:
    """An axis of this length in pieces of at most ``PIECE`` entries, of which each index has so many."""
    step = max(1, PIECE // max(1, entries))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _part(tensor: Tensor, axis: int, piece: slice, orders: Orders) -> Tensor:
    """A piece of what a tensor would be in these orders."""
    if axis not in orders:
        return reorder(tensor.narrow(axis, piece.start, piece.stop - piece.start), orders)
    return reorder(tensor, {axis: orders[axis][piece]} | {dim: order for dim, order in orders.items() if dim != axis})


def reorder(tensor: Tensor, orders: Orders) -> Tensor:
    """A tensor with these axes in other orders; the tensor itself where there are none."""
    for dim, order in orders.items():
        tensor = tensor.index_select(dim, order.to(tensor.device))
    return tensor
