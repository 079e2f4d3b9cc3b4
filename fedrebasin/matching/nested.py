"""Heads and groups: the outer permutation and what depends on it are found together.

Two heads can be compared only once the units within them are in the best order. So each pair of outer indices
is scored by the best assignments of its inner units, and one outer assignment then chooses among the pairs.

Index letters: i outer index of the reference, j of the model, u and v units within them, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedrebasin.assignment import solve_assignment
from fedrebasin.matching.plan import Block
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.perms import Perms


def families_over(problem: WeightProblem, perm: str) -> list[str]:
    """The families whose outer axis ``perm`` moves."""
    return [inner for inner, outer in problem.spec.over.items() if outer == perm]


def nested_step(problem: WeightProblem, block: Block, names: set[str] | None = None) -> Perms:
    """Steps for an outer permutation and its families: optimal where no tensor has two of these families.

    Tensors that have more than one of the families are left out, as is what is not in ``names``.
    """
    families = families_over(problem, block.perm)
    chosen = set(problem.plan.tensors[block]) if names is None else names
    members = {
        family: {name for name in problem.plan.tensors[Block(family, size, 0)] if name in chosen}
        for family in families
        for size in [problem.spec.perm_shapes[family][1]]
    }
    shared = {name for name in chosen if sum(name in group for group in members.values()) > 1}
    inner = set().union(*members.values())
    score = problem.similarity(block, chosen - inner)
    orders: dict[str, Tensor] = {}
    for family in families:
        value, orders[family] = _best_inner(problem, family, members[family] - shared)
        score = score + value
    outer = solve_assignment(score)
    rows = torch.arange(block.size, device="cpu")
    return {block.perm: outer, **{family: orders[family][rows, outer] for family in families}}


def _best_inner(problem: WeightProblem, family: str, names: set[str]) -> tuple[Tensor, Tensor]:
    """The best inner assignment of every pair of outer indices: values ``(n, n)`` and orders ``(n, n, units)``."""
    count, size = problem.spec.perm_shapes[family]
    similarity = torch.zeros(count, count, size, size, dtype=torch.float64, device="cpu")
    rows = [problem.unfolded(Block(family, size, row), names) for row in range(count)]
    for name in rows[0]:
        for slab in range(len(rows[0][name])):
            reference = torch.stack([row[name][slab][0] for row in rows])
            model = torch.stack([row[name][slab][1] for row in rows])
            product = reference.flatten(0, 1) @ model.flatten(0, 1).T
            similarity += product.view(count, size, count, size).transpose(1, 2).double().cpu()
    order = torch.stack([torch.stack([solve_assignment(pair) for pair in row]) for row in similarity])
    return similarity.gather(3, order.unsqueeze(3)).squeeze(3).sum(2), order
