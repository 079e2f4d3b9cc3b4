"""The weight-matching problem of one pair: similarity matrices, moves and the objective.

Index letters: i unit of the reference, j unit of the model, g index of a family's outer leaf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.layout import positions
from fedrebasin.permute import Perms, compose, coordinate, family_grid, identity_perms, outer_dim, permute_tensor
from fedrebasin.spec import PermutationSpec


@dataclass(frozen=True)
class Block:
    """What one assignment decides: a permutation, or row ``row`` of a family."""

    perm: str
    size: int
    row: int | None = None


@dataclass(frozen=True)
class _Unfolding:
    """Where a block's units lie in one tensor: along ``dim`` at ``places``, within ``rows`` of ``row_dim``."""

    name: str
    dim: int
    places: Tensor | None
    row_dim: int | None = None
    rows: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor as a matrix with one row for each unit."""
        if self.row_dim is not None and self.rows is not None:
            tensor = tensor.index_select(self.row_dim, self.rows.to(tensor.device))
        if self.places is None:
            return tensor.movedim(self.dim, 0).reshape(tensor.shape[self.dim], -1)
        units, copies = self.places.shape
        picked = tensor.index_select(self.dim, self.places.flatten().to(tensor.device)).movedim(self.dim, 0)
        return picked.reshape(units, copies, -1).reshape(units, -1)


class WeightProblem:
    """A reference and a model that is permuted step by step.

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
        buffers = set(spec.buffers)
        tied = {axis.name for axes in spec.tied.values() for axis in axes} - buffers
        self.names = [name for name in spec.axes if name in tied]
        self.reference = {name: _prepare(reference[name], name, "reference", device) for name in self.names}
        self.original = {name: _prepare(model[name], name, "model", device) for name in self.names}
        self.blocks = [
            Block(perm, shape[-1], row)
            for perm, shape in spec.perm_shapes.items()
            for row in (range(shape[0]) if len(shape) == 2 else [None])
        ]
        self._unfoldings = {block: self._unfold(block) for block in self.blocks}
        self.scales = {block: self._scale(block) for block in self.blocks}
        self.reset(init)

    def reset(self, init: Mapping[str, Tensor] | None = None) -> None:
        """Start again from ``init``, or from the identity."""
        self.perms: Perms = identity_perms(self.spec) if init is None else {k: v.cpu().clone() for k, v in init.items()}
        order = self._order(list(self.spec.perm_shapes)) if init is not None else []
        self.current = {
            name: permute_tensor(self.spec.axes[name], order, self.perms, tensor) if order else tensor
            for name, tensor in self.original.items()
        }

    def tensors(self, block: Block) -> set[str]:
        """The tensors that the block's assignment moves."""
        return {unfolding.name for unfolding in self._unfoldings[block]}

    def is_quadratic(self, block: Block) -> bool:
        """Whether the block moves two axes of one tensor, so that its similarity is only a linearisation."""
        return len(self._unfoldings[block]) != len(self.tensors(block))

    def similarity(self, block: Block, names: set[str] | None = None) -> Tensor:
        """``similarity[i, j]`` of the block's units, over ``names`` only if given: float64 ``(n, n)``, on the CPU."""
        total: Tensor | None = None
        for unfolding in self._unfoldings[block]:
            if names is None or unfolding.name in names:
                term = unfolding(self.reference[unfolding.name]) @ unfolding(self.current[unfolding.name]).T
                total = term.double() if total is None else total.add_(term)
        return torch.zeros(block.size, block.size, dtype=torch.float64) if total is None else total.cpu()

    def move(self, block: Block, step: Tensor) -> None:
        """Permute the current model's units of the block: ``new[i] = current[step[i]]``."""
        perms = {block.perm: step}
        if block.row is not None:
            rows = torch.arange(block.size).expand(self.spec.perm_shapes[block.perm]).clone()
            rows[block.row] = step
            perms = {block.perm: rows}
        order = self._order([block.perm])
        for name in self.tensors(block):
            self.current[name] = permute_tensor(self.spec.axes[name], order, perms, self.current[name])
        self.perms = compose(self.spec, self.perms, {**identity_perms(self.spec), **perms})

    def objective(self, names: set[str] | None = None) -> float:
        """The sum of <reference, current model> over the tied parameters, or over ``names``."""
        chosen = self.names if names is None else sorted(names)
        return math.fsum(_dot(self.reference[name], self.current[name]) for name in chosen)

    def _order(self, perms: list[str]) -> list[tuple[str, str]]:
        return sorted(((perm, self.spec.over.get(perm, "")) for perm in perms), key=lambda item: item[1] != "")

    def _scale(self, block: Block) -> float:
        names = sorted(self.tensors(block))
        first = math.fsum(_dot(self.reference[name], self.reference[name]) for name in names)
        second = math.fsum(_dot(self.original[name], self.original[name]) for name in names)
        return math.sqrt(first * second)

    def _unfold(self, block: Block) -> list[_Unfolding]:
        found = []
        for axis in self.spec.tied[block.perm]:
            if axis.name in self.reference:
                found.append(self._unfold_axis(block, axis.name, axis.dim))
        return found

    def _unfold_axis(self, block: Block, name: str, dim: int) -> _Unfolding:
        layouts = self.spec.axes[name]
        places = positions(layouts[dim], block.perm)
        assert places is not None  # the spec's ``tied`` lists only axes that have the permutation
        if block.row is None:
            plain = len(places) == layouts[dim].size and bool((places[:, 0] == torch.arange(len(places))).all())
            return _Unfolding(name, dim, None if plain else places)
        outer = self.spec.over[block.perm]
        own = positions(layouts[dim], outer)
        if own is not None:
            return _Unfolding(name, dim, family_grid(own, places, layouts[dim].size)[block.row])
        other = outer_dim(layouts, dim, outer)
        rows = (coordinate(layouts[other], outer) == block.row).nonzero().squeeze(1)
        return _Unfolding(name, dim, places, other, rows)


def _prepare(tensor: Tensor, name: str, label: str, device: torch.device | str | None) -> Tensor:
    tensor = tensor.detach()
    if device is not None:
        tensor = tensor.to(device)
    if not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if not bool(tensor.isfinite().all()):
        raise SpecMismatchError(f"{label}: {name!r} holds a NaN or an infinity; leave this model out")
    return tensor


def _dot(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first.reshape(-1).double(), second.reshape(-1).double()))
