"""Git Re-Basin's Algorithm 1 as one would write it down: the honest baseline of the speed benchmark.

float32, random order, sweeps until nothing moves; every axis of the reference is unfolded once, no state dict is
copied, assignments are scipy's. Layouts of convolutional and linear networks only (a perm on whole axes, or on
the channels of a flattened axis).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedrebasin import PermutationSpec
from fedrebasin.layout import Free, Layout, Product, Sum, leaves


@dataclass(frozen=True)
class PlainResult:
    """Permutations, their objective, and where the seconds went."""

    perms: dict[str, Tensor]
    objective: float
    seconds: float
    products: float
    assignments: float
    solved: int
    sweeps: int


def _axis_order(layout: Layout, perms: Mapping[str, Tensor]) -> Tensor | None:
    match layout:
        case Free():
            return perms[layout.perm]
        case Product(factors=(Free() as first, *_)):
            inner = layout.size // first.size
            return (perms[first.perm].unsqueeze(1) * inner + torch.arange(inner)).flatten()
        case Sum():
            starts, found = 0, []
            for part in layout.parts:
                own = _axis_order(part, perms)
                found.append(starts + (torch.arange(part.size) if own is None else own))
                starts += part.size
            return torch.cat(found)
    return None


def plain_weight_matching(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    seed: int = 0,
    sweeps: int = 100,
) -> PlainResult:
    """Sweep over all permutations in random order, each by one product for each tied axis and one assignment."""
    started = time.perf_counter()
    buffers = set(spec.buffers)
    perms = {perm: torch.arange(shape[-1]) for perm, shape in spec.perm_shapes.items()}
    tied = {perm: [axis for axis in axes if axis.name not in buffers] for perm, axes in spec.tied.items()}
    unfolded = {
        (perm, axis): _rows(reference[axis.name], spec.axes[axis.name][axis.dim], axis.dim, perm)
        for perm, axes in tied.items()
        for axis in axes
    }
    generator = torch.Generator().manual_seed(seed)
    products = assignments = 0.0
    solved = done = 0
    moved = True
    while moved and done < sweeps:
        moved, done = False, done + 1
        for index in torch.randperm(len(perms), generator=generator).tolist():
            perm = list(perms)[index]
            before = time.perf_counter()
            similarity = torch.zeros(len(perms[perm]), len(perms[perm]))
            for axis in tied[perm]:
                tensor = model[axis.name]
                for dim, layout in enumerate(spec.axes[axis.name]):
                    order = None if dim == axis.dim else _axis_order(layout, perms)
                    if order is not None:
                        tensor = tensor.index_select(dim, order)
                other = _rows(tensor, spec.axes[axis.name][axis.dim], axis.dim, perm)
                similarity += unfolded[perm, axis] @ other.T
            products += time.perf_counter() - before
            before = time.perf_counter()
            _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
            assignments += time.perf_counter() - before
            solved += 1
            new, units = torch.from_numpy(columns), torch.arange(len(columns))
            gain = float((similarity[units, new] - similarity[units, perms[perm]]).double().sum())
            if gain > 1e-6 * float(similarity[units, new].double().abs().sum()):
                perms[perm], moved = new, True
    objective = 0.0
    for name in {axis.name for axes in tied.values() for axis in axes}:
        tensor = model[name]
        for dim, layout in enumerate(spec.axes[name]):
            order = _axis_order(layout, perms)
            tensor = tensor if order is None else tensor.index_select(dim, order)
        objective += float((reference[name] * tensor).sum(dtype=torch.float64))
    return PlainResult(perms, objective, time.perf_counter() - started, products, assignments, solved, done)


def _rows(tensor: Tensor, layout: Layout, dim: int, perm: str) -> Tensor:
    """One row for each unit of ``perm``; parts of a sum that carry it lie side by side."""
    if isinstance(layout, Sum):
        starts, rows = 0, []
        for part in layout.parts:
            if any(isinstance(end, Free) and end.perm == perm for end in leaves(part)):
                rows.append(_rows(tensor.narrow(dim, starts, part.size), part, dim, perm))
            starts += part.size
        return torch.cat(rows, dim=1)
    size = next(end.size for end in leaves(layout) if isinstance(end, Free))
    front = tensor.movedim(dim, 0)
    return front.reshape(size, -1)
