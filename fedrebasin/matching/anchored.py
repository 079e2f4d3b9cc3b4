"""The anchored start of weight matching: permutations settled one by one, from what is fixed inwards.

A tensor says something exact about a permutation once its other axes are settled. Of an axis that is not, only the
mean over its units is used: the expected similarity if its order is drawn at random, to which the identity, the
usual start, adds nothing but noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedrebasin.assignment import best_assignment
from fedrebasin.matching.nested import nested_step
from fedrebasin.matching.plan import Block, Term
from fedrebasin.matching.planted import planted_order, stays_planted, worth_a_proof
from fedrebasin.matching.problem import WeightProblem


def anchored_start(problem: WeightProblem) -> tuple[list[Block], set[Block]]:
    """Settle the permutations one after the other, each by the tensors whose other axes are settled already.

    The one with the most settled entries for each of its units comes first. A planted permutation is found in this
    way whatever the depth; as long as one after the other is proved from a part of the columns, the others are not
    multiplied.
    Returns the blocks in the order in which they were settled, and those that were settled by all of their tensors,
    for which there is nothing better while the others stay.
    """
    plan = problem.plan
    cluster_of = {block.perm: key for key, group in plan.clusters.items() for block in group}
    open_clusters = {name: {cluster_of[perm] for perm in perms} for name, perms in plan.perms_of.items()}
    known: dict[str, set[str]] = {key: set() for key in plan.clusters}
    evidence = dict.fromkeys(plan.clusters, 0.0)
    units = {key: sum(block.size for block in group) for key, group in plan.clusters.items()}

    def learn(name: str) -> None:
        if len(open_clusters[name]) == 1:
            (key,) = open_clusters[name]
            known[key].add(name)
            evidence[key] += _entries(problem, name, plan.clusters[key]) / units[key]

    for name in plan.names:
        learn(name)
    order: list[Block] = []
    best: set[Block] = set()
    proofs: list[bool] = []
    while evidence:
        key = max(evidence, key=lambda key: evidence[key])
        group = plan.clusters[key]
        if evidence.pop(key) > 0:
            found = None
            if all(proofs) and worth_a_proof(problem, group, known[key]):
                found = planted_order(problem, group[0], known[key])
                proofs.append(found is not None)
            if found is not None:
                problem.put({group[0].perm: found}, [group[0].perm])
            else:
                _settle(problem, group, known[key], {block for other in evidence for block in plan.clusters[other]})
            if len(group) == 1 and group[0] not in plan.relative and known[key] >= set(plan.tensors[group[0]]):
                best.add(group[0])
        order += group
        for name in dict.fromkeys(name for block in group for name in plan.tensors[block]):
            open_clusters[name].discard(key)
            learn(name)
    if proofs and all(proofs):
        for block in set(order) - best:
            if worth_a_proof(problem, [block], plan.tensors[block]) and stays_planted(problem, block):
                best.add(block)
    return order, best


def _entries(problem: WeightProblem, name: str, group: list[Block]) -> int:
    """Entries that speak for a group; a tensor that has two of its families says nothing before one is known."""
    families = {block.perm for block in group if block.row is not None}
    return problem.entries_of(name) if len(problem.plan.perms_of[name] & families) < 2 else 0


def _settle(problem: WeightProblem, group: list[Block], names: set[str], unsettled: set[Block]) -> None:
    """Move a permutation, and the families over it, to where the tensors ``names`` want them."""
    (first, *families) = group
    nested = bool(families) and first.row is None
    if nested:
        problem.move(nested_step(problem, first, names))
    for block in families if nested else group:
        similarity = problem.similarity(block, names)
        if block in problem.plan.relative:
            problem.move(problem.steps(block, best_assignment(similarity)))
        else:
            expected = _expected_similarity(problem, block, names, unsettled)
            problem.put({block.perm: best_assignment(similarity + expected)}, [block.perm])


def _expected_similarity(problem: WeightProblem, block: Block, names: set[str], unsettled: set[Block]) -> Tensor:
    """What the other tensors say of a block's units if the unsettled axes are in random order: ``(n, n)``."""
    plan = problem.plan
    total = torch.zeros(block.size, block.size, dtype=problem.dtype, device="cpu")
    for term in plan.terms[block]:
        if term.name in names or term.name not in plan.simple:
            continue
        orders = problem.other_orders(term)
        moved = {dim: _terms_along(problem, term, dim, unsettled) for dim in orders}
        # the mean over a whole axis is the same in every order
        told = {dim: order for dim, order in orders.items() if all(t.places is not None for t in moved[dim])}
        sides = problem.reference[term.name], problem.reordered(term.name, told)
        for dim in orders:
            if moved[dim]:
                sides = _averaged(sides[0], dim, moved[dim]), _averaged(sides[1], dim, moved[dim])
        total += (term.rows(sides[0]) @ term.rows(sides[1]).T).cpu()
    return total


def _terms_along(problem: WeightProblem, term: Term, dim: int, blocks: set[Block]) -> list[Term]:
    """The slabs of these blocks along another axis of a term's tensor."""
    return [t for block in blocks for t in problem.plan.terms[block] if (t.name, t.dim) == (term.name, dim)]


def _averaged(tensor: Tensor, dim: int, terms: list[Term]) -> Tensor:
    """The mean over the units of each term along ``dim``, times the root of their number, beside what is left."""
    front = tensor.movedim(dim, 0)
    if terms[0].places is None:  # the whole axis
        return _mean(front, terms[0]).movedim(0, dim)
    rest = torch.ones(len(front), dtype=torch.bool, device="cpu")
    parts = []
    for term in terms:
        assert term.places is not None
        parts.append(_mean(front[term.places.to(front.device)], term))
        rest[term.places] = False
    return torch.cat([front[rest.to(front.device)], *parts]).movedim(0, dim)


def _mean(part: Tensor, term: Term) -> Tensor:
    units = len(part) // term.copies
    total = part.reshape(units, term.copies, *part.shape[1:]).sum(0)
    return total / math.sqrt(units)
