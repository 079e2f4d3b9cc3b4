"""The weight-matching problem of one pair: similarity matrices, moves and the objective.

Index letters: i unit of the reference, j unit of the model, g index of a family's outer leaf.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.matching.slabs import Slab, slabs
from fedrebasin.perms import Perms, compose, identity_perms
from fedrebasin.permute import permute_tensor
from fedrebasin.spec import PermutationSpec


@dataclass(frozen=True)
class Block:
    """What one assignment decides: a permutation, or row ``row`` of a family."""

    perm: str
    size: int
    row: int | None = None


@dataclass(frozen=True)
class _Unfolding:
    """A slab of one tensor, seen as a matrix with one row for each unit of the block."""

    name: str
    slab: Slab

    def __call__(self, tensor: Tensor) -> Tensor:
        for dim, index in self.slab.within:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        units, copies = self.slab.places.shape
        order = self.slab.places.flatten()
        if len(order) != tensor.shape[self.slab.dim] or not bool((order == torch.arange(len(order))).all()):
            tensor = tensor.index_select(self.slab.dim, order.to(tensor.device))
        return tensor.movedim(self.slab.dim, 0).reshape(units, copies, -1).reshape(units, -1)


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
        self.current = {
            name: tensor if init is None else permute_tensor(self.spec.axes[name], self.perms, tensor)
            for name, tensor in self.original.items()
        }

    def tensors(self, block: Block) -> set[str]:
        """The tensors that the block's assignment moves."""
        return {unfolding.name for unfolding in self._unfoldings[block]}

    def is_quadratic(self, block: Block) -> bool:
        """Whether the block moves two axes of one tensor, so that its similarity is only a linearisation."""
        dims = {(unfolding.name, unfolding.slab.dim) for unfolding in self._unfoldings[block]}
        return len(dims) != len(self.tensors(block))

    def similarity(self, block: Block, names: set[str] | None = None) -> Tensor:
        """``similarity[i, j]`` of the block's units, over ``names`` only if given: float64 ``(n, n)``, on the CPU."""
        total: Tensor | None = None
        for unfolding in self._unfoldings[block]:
            if names is None or unfolding.name in names:
                term = unfolding(self.reference[unfolding.name]) @ unfolding(self.current[unfolding.name]).T
                total = term.double() if total is None else total.add_(term)
        return torch.zeros(block.size, block.size, dtype=torch.float64) if total is None else total.cpu()

    def unfolded(self, block: Block, names: set[str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Reference and current model as matrices with one row for each unit of the block, for each of ``names``."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for unfolding in self._unfoldings[block]:
            if unfolding.name in names:
                pair = unfolding(self.reference[unfolding.name]), unfolding(self.current[unfolding.name])
                found.setdefault(unfolding.name, []).append(pair)
        return found

    def move(self, steps: Perms) -> None:
        """Permute the current model's units: ``new[i] = current[step[i]]``."""
        for name in self.names_of(steps):
            self.current[name] = permute_tensor(self.spec.axes[name], steps, self.current[name])
        self.perms = compose(self.spec, self.perms, {**identity_perms(self.spec), **steps})

    def steps(self, block: Block, step: Tensor) -> Perms:
        """The permutations that move the units of one block."""
        if block.row is None:
            return {block.perm: step}
        rows = torch.arange(block.size).expand(self.spec.perm_shapes[block.perm]).clone()
        rows[block.row] = step
        return {block.perm: rows}

    def names_of(self, perms: Iterable[str]) -> set[str]:
        """The parameters that these permutations move."""
        return {axis.name for perm in perms for axis in self.spec.tied[perm] if axis.name in self.reference}

    def objective(self, names: set[str] | None = None) -> float:
        """The sum of <reference, current model> over the tied parameters, or over ``names``."""
        chosen = self.names if names is None else sorted(names)
        return math.fsum(_dot(self.reference[name], self.current[name]) for name in chosen)

    def _scale(self, block: Block) -> float:
        names = sorted(self.tensors(block))
        first = math.fsum(_dot(self.reference[name], self.reference[name]) for name in names)
        second = math.fsum(_dot(self.original[name], self.original[name]) for name in names)
        return math.sqrt(first * second)

    def _unfold(self, block: Block) -> list[_Unfolding]:
        names = dict.fromkeys(axis.name for axis in self.spec.tied[block.perm] if axis.name in self.reference)
        return [_Unfolding(name, slab) for name in names for slab in slabs(self.spec.axes[name], block.perm, block.row)]


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
