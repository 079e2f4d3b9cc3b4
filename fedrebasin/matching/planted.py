"""The best order of a permutation's units where it can be proved from a part of the columns.

Index letters: i, j units of one permutation; a_i the reference's weights at unit i, b_i the model's.

If every unit of the model lies within half of the distance from its partner in the reference to the nearest other unit,
``|a_i - b_p(i)| <= min_j |a_i - a_j| / 2``, then p is the best assignment (``certificate.py``). A distance over some of
the columns is at most the distance over all. So a permuted copy with noise is matched by a guess from a part of the
columns, and proved by one look at the others, without the product of all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from fedrebasin.matching.certificate import margins_of
from fedrebasin.matching.plan import Block, Term
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.matching.products import cut, reorder

#: Columns with this share of the squares are multiplied, and so many at least; the largest noise that is proved is,
#: in squares, about half of that share.
_SHARE, _LEAST = 0.15, 256
#: Tensors with fewer columns do not tell units apart.
_WIDE = 64
#: Blocks whose largest tensor has fewer entries are multiplied whole.
_LARGE = 1 << 19


def planted_order(problem: WeightProblem, block: Block, names: Collection[str]) -> Tensor | None:
    """The units' best order by the tensors ``names``, the others as they are; None where it is not proved.

    Examples
    --------
    >>> from fedrebasin import permute, random_perms, trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(2048, 512), torch.nn.ReLU(), torch.nn.Linear(512, 2))
    >>> spec = trace(net, (torch.randn(2, 2048),))
    >>> perms = random_perms(spec, 1)
    >>> problem = WeightProblem(spec, net.state_dict(), permute(spec, perms, net.state_dict()))
    >>> found = planted_order(problem, problem.blocks[0], ["0.weight"])
    >>> bool((perms["0"][found] == torch.arange(512)).all())
    True
    """
    terms = _terms(problem, block, names)
    ours, theirs = _some_columns(problem, block, terms)
    order = (ours @ theirs.T).argmax(1).cpu()  # each unit's own best: no assignment is solved for what is not planted
    if int(order.bincount(minlength=block.size).amax()) > 1:
        return None
    return order if _proved(problem, terms, order, ours) else None


def stays_planted(problem: WeightProblem, block: Block) -> bool:
    """True if the block's order as it is is proved to be the best by all of its tensors, the others as they are."""
    terms = _terms(problem, block, problem.plan.tensors[block])
    return _proved(problem, terms, problem.perms[block.perm], _some_columns(problem, block, terms)[0])


def worth_a_proof(problem: WeightProblem, group: Sequence[Block], names: Collection[str]) -> bool:
    """True if a group is one block that moves one whole axis of each of ``names``, of which a large one is not zero."""
    (block, *families), plan = group, problem.plan
    terms = _terms(problem, block, names)
    plain = all(term.whole and term.copies == 1 and term.name in plan.simple for term in terms)
    entries = max((problem.entries_of(term.name) for term in terms if problem.scales[term.name]), default=0)
    return not families and block not in plan.relative and plain and entries >= max(_LARGE, _WIDE * block.size)


def _terms(problem: WeightProblem, block: Block, names: Collection[str]) -> list[Term]:
    return [term for term in problem.plan.terms[block] if term.name in names]


def _some_columns(problem: WeightProblem, block: Block, terms: list[Term]) -> tuple[Tensor, Tensor]:
    """Columns of the reference and, units unmoved, of the model, of the tensors with the largest entries first."""
    wide = [term for term in terms if _width(problem, block, term) >= _WIDE and problem.scales[term.name]]
    wanted, few = _SHARE * sum(problem.scales[term.name] for term in wide), _LEAST
    parts: list[tuple[Tensor, Tensor]] = []
    for term in sorted(wide, key=lambda term: _width(problem, block, term) / problem.scales[term.name]):
        share = max(wanted / problem.scales[term.name], few / _width(problem, block, term))
        parts.append(_columns(problem, term, share))
        wanted, few = wanted - problem.scales[term.name], few - parts[-1][0].shape[1]
        if wanted <= 0 and few <= 0:
            break
    ours, theirs = zip(*parts, strict=True)
    return torch.cat(ours, 1), torch.cat(theirs, 1)


def _width(problem: WeightProblem, block: Block, term: Term) -> int:
    return problem.entries_of(term.name) // block.size


def _columns(problem: WeightProblem, term: Term, share: float) -> tuple[Tensor, Tensor]:
    """A share of a term's columns, all if it is 1 or more."""
    reference, orders = problem.reference[term.name], problem.other_orders(term)
    axis = max((dim for dim in range(reference.ndim) if dim != term.dim), key=lambda dim: reference.shape[dim])
    length = reference.shape[axis]
    count = min(length, 1 + int(share * length))
    where = orders.pop(axis, torch.arange(length, device="cpu"))[:count]
    model = reorder(problem.model[term.name].index_select(axis, where.to(reference.device)), orders)
    return term.rows(reference.narrow(axis, 0, count)), term.rows(model)


def _proved(problem: WeightProblem, terms: list[Term], order: Tensor, some: Tensor) -> bool:
    margins = margins_of(some @ some.T)
    moved = torch.zeros_like(margins)
    for term in terms:
        for piece, change in _changes(problem, term, order):
            moved[piece] += change
            if not bool((moved[piece] <= margins[piece]).all()):  # a NaN is not
                return False
    return True


def _changes(problem: WeightProblem, term: Term, order: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Units in pieces, and how far each is from its partner over a term's columns, ``|a_i - b_p(i)|^2``."""
    reference, model, orders = problem.reference[term.name], problem.model[term.name], problem.other_orders(term)
    for piece in cut(len(order), reference.numel() // len(order)):
        part = reorder(model.index_select(term.dim, order[piece].to(model.device)), orders)
        part = part.sub_(reference.narrow(term.dim, piece.start, piece.stop - piece.start))
        others = [dim for dim in range(part.ndim) if dim != term.dim]
        yield piece, (part.square().sum(others) if others else part.square())
