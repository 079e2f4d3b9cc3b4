"""Relaxed permutations: doubly stochastic matrices instead of permutations.

A permutation of ``n`` units becomes a matrix ``(n, n)``, new unit by old unit. A family over a fixed leaf becomes one
matrix for each index, ``(outer, n, n)``. A family over another permutation becomes ``(outer, outer, n, n)``: what new
head ``g`` takes from old head ``h``, whose sums over units are the entry ``g, h`` of the outer matrix. The values that
stand for permutations are the corners of this set, and the set is their convex hull, heads and groups included.

Index letters: g, h new and old outer index; u, v new and old unit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedrebasin.assignment import solve_assignment
from fedrebasin.matching.doubly_stochastic import sinkhorn
from fedrebasin.perms import Perms
from fedrebasin.spec import PermutationSpec

Relaxed = dict[str, Tensor]

#: How far the sums of a softened permutation may be from one.
_TOLERANCE = 1e-6


def corner(spec: PermutationSpec, perms: Mapping[str, Tensor], like: Tensor) -> Relaxed:
    """Permutations as matrices, of the type and on the device of ``like``.

    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 2),)})
    >>> corner(spec, {"a": torch.tensor([1, 0])}, torch.zeros(()))["a"]
    tensor([[0., 1.],
            [1., 0.]])
    """
    result = {}
    for perm, shape in spec.perm_shapes.items():
        units = torch.eye(shape[-1], dtype=like.dtype, device=like.device)[perms[perm].to(like.device)]
        outer = perms.get(spec.over.get(perm, ""))
        if outer is not None:
            heads = torch.eye(shape[0], dtype=like.dtype, device=like.device)[outer.to(like.device)]
            units = torch.einsum("gh,guv->ghuv", heads, units)
        result[perm] = units
    return result


def no_logits(spec: PermutationSpec, like: Tensor) -> Relaxed:
    """For every permutation zeros of the shape that :func:`soften` takes: nothing is preferred."""
    result = {}
    for perm, shape in spec.perm_shapes.items():
        outer = shape[:1] if spec.over.get(perm) in spec.perm_shapes else ()
        result[perm] = torch.zeros(*outer, *shape[:-1], shape[-1], shape[-1], dtype=like.dtype, device=like.device)
    return result


def soften(
    spec: PermutationSpec, logits: Mapping[str, Tensor], *, gradient: str = "implicit", iterations: int = 20
) -> Relaxed:
    """Relaxed permutations from any numbers, by :func:`~fedrebasin.matching.doubly_stochastic.sinkhorn`.

    The units of new head ``g`` and old head ``h`` are scaled by themselves, and weighed by what ``g`` takes of ``h``.

    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 2),)})
    >>> soften(spec, no_logits(spec, torch.zeros(())))["a"]
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    found = {
        perm: sinkhorn(tensor, tolerance=_TOLERANCE, gradient=gradient, iterations=iterations)
        for perm, tensor in logits.items()
    }
    for perm, outer in spec.over.items():
        if outer in found:
            found[perm] = found[outer][:, :, None, None] * found[perm]
    return found


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], lam: float) -> Relaxed:
    """``(1 - lam) * start + lam * end``."""
    return {perm: torch.lerp(tensor, end[perm], lam) for perm, tensor in start.items()}


def best_corner(spec: PermutationSpec, scores: Mapping[str, Tensor]) -> Perms:
    """The permutations for which ``sum_perm <scores, corner>`` is largest, families and their outer leaf together.

    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 2),)})
    >>> best_corner(spec, {"a": torch.tensor([[0.1, 0.9], [0.8, 0.2]])})
    {'a': tensor([1, 0])}
    """
    found: Perms = {}
    orders: dict[str, Tensor] = {}
    totals = {perm: scores[perm].double().cpu() for perm in spec.perm_shapes if perm not in spec.over}
    for perm, outer in spec.over.items():
        score = scores[perm].double().cpu()
        size = score.shape[-1]
        flat = score.reshape(-1, size, size)
        order = torch.stack([solve_assignment(pair) for pair in flat])
        if outer not in totals:
            found[perm] = order
        else:
            orders[perm] = order.view(score.shape[:-1])
            totals[outer] = totals[outer] + flat.gather(2, order.unsqueeze(2)).sum((1, 2)).view(score.shape[:2])
    found |= {perm: solve_assignment(total) for perm, total in totals.items()}
    for perm, order in orders.items():
        outer_perm = found[spec.over[perm]]
        found[perm] = order[torch.arange(len(outer_perm), device="cpu"), outer_perm]
    return {perm: found[perm] for perm in spec.perm_shapes}
