"""Units of the wider layer that share one unit of the narrower: split on the way up, added up on the way down."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrebasin.widths.problem import WidthProblem


def fold(problem: WidthProblem, perm: str, *, above: float) -> None:
    """Let unmatched units of the wider layer share the unit of the narrower that is written most alike.

    What is read from a unit that is shared is divided by how much of it each of the sharers gives in the wider network;
    a shared unit of a narrower reference is written as their mean by size of what is read. Dead units share nothing.
    """
    matrix = problem.writes[perm]
    wider_reference = matrix.shape[0] > matrix.shape[1]
    if matrix.shape[0] == matrix.shape[1]:
        return
    matrix = matrix if wider_reference else matrix.T  # (wider, narrower)
    one, other = _joined(problem, perm, reads=False)
    wide, narrow = (one, other) if wider_reference else (other, one)
    wide_read = _joined(problem, perm, reads=True)[0 if wider_reference else 1]
    cosine = _rows_of_unit_length(wide) @ _rows_of_unit_length(narrow).T
    matched = matrix.any(1)
    best = torch.where(matched, matrix.argmax(1), cosine.argmax(1))
    shared = matched | (cosine.amax(1) > above)
    group = torch.zeros_like(matrix)
    group[torch.arange(len(best), device="cpu")[shared], best[shared]] = 1.0
    total = group @ (group.T @ wide_read)
    shares = group * (wide_read * total).sum(1).clamp_min(0).unsqueeze(1)
    sums = shares.sum(0)
    equal = group / group.sum(0).clamp_min(1)
    shares = torch.where(sums > 0, shares / sums.where(sums > 0, torch.ones_like(sums)), equal)
    if wider_reference:
        problem.writes[perm], problem.reads[perm] = group, shares
    else:
        problem.writes[perm], problem.reads[perm] = shares.T.contiguous(), group.T.contiguous()


def _joined(problem: WidthProblem, perm: str, *, reads: bool) -> tuple[Tensor, Tensor]:
    """All that writes, or reads, the units of both networks: ``(units, entries)`` each."""
    found = list(problem.rows(perm, reads=reads))
    if not found:
        none, others = (torch.zeros(size, 1, dtype=torch.float64, device="cpu") for size in problem.sizes(perm))
        return none, others
    return torch.cat([one for one, _ in found], 1), torch.cat([other for _, other in found], 1)


def _rows_of_unit_length(rows: Tensor) -> Tensor:
    norms = rows.square().sum(1, keepdim=True).sqrt()
    return rows / norms.where(norms > 0, torch.ones_like(norms))
