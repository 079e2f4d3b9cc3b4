"""Which permutation each reply of a round gets, by the policy on the reference.

A round is *apart* if most examples are behind replies that are not near the model that was sent
(``common_start.py``). Replies that are aligned to each other have lost the sent model's order; unless the round is
apart, and starts the server's optimizer anew, the merged model is brought back into that order, so that optimizer
moments keep their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import torch
from flwr.common.logger import log

from fedrebasin import (
    PermutationSpec,
    compose,
    identity_perms,
    merge,
    moved_fraction,
    permute,
    weight_matching,
)
from fedrebasin.matching.methods import JOINT_METHOD, JOINT_REFERENCES
from fedrebasin.strategies.common_start import Nearness, measure_nearness
from fedrebasin.strategies.matcher import Matcher
from fedrebasin.strategies.reply import Reply
from fedrebasin.strategies.to_one import NO_WORKERS, Matched, Perms, State, find_certain, match_to_one
from fedrebasin.strategies.trajectory import gain_of, same_order
from fedrebasin.strategies.workers import Workers

#: log10 of the number of orders from which on a reply in the sent model's order is there for a reason
CERTAIN = 6.0


@dataclass(frozen=True)
class Alignment:
    """The permutations of a round.

    Attributes
    ----------
    perms : list of dict
        One for each reply.
    apart : bool
        True if the replies were not trained from the model that was sent, and their order is a new one.
    objective_gain : float
        How much the matching objective (an inner product of weights) gained, mean over the matchings.
    moved_fraction : float
        Share of the hidden units that change their place, mean over the replies.
    how : str
        For the log: which reference, and why.
    reused : int
        How many replies moved as their node's last one did (``trajectory.py``).
    failed : tuple of int
        Places of the replies that could not be matched, with the identity as permutations: they are to be left out.
    """

    perms: list[Perms]
    apart: bool
    objective_gain: float
    moved_fraction: float
    how: str
    reused: int = 0
    failed: tuple[int, ...] = ()

    @property
    def moves(self) -> bool:
        """True if any unit of any reply changes its place."""
        return self.moved_fraction > 0


def find_alignment(
    spec: PermutationSpec,
    sent: State,
    replies: Sequence[Reply],
    match: Matcher,
    *,
    reference: str,
    seed: int,
    device: torch.device | None,
    last: Sequence[Perms | None] | None = None,
    workers: Workers = NO_WORKERS,
) -> Alignment:
    """Find the permutations of a round.

    Parameters
    ----------
    spec : PermutationSpec
    sent : state dict
        The model that the server sent.
    replies : sequence of Reply
        At least one.
    match : Matcher
        Matches one model to another. Replies are aligned to each other if it is weight matching, by any other method to
        the reply with most examples.
    reference : {"auto", "global", "largest", "merge-many", "medoid", "cycle-consistent", "straight-through-many"}
    seed : int
    device : torch.device, optional
    last : sequence of perms or None, optional
        For each reply what its node's last one was permuted by, if it moved. Weight matching to the sent model starts
        there where it cannot be improved, or is better than what it finds without.
    workers : Workers, optional
        How many replies are matched at once; the permutations do not depend on it.

    Notes
    -----
    Where every matching fails (the sent model holds a NaN, a device is out of memory), that is logged, and nothing
    moves; where some do, their replies are named as ``failed``.
    """
    last = [None] * len(replies) if last is None or match.name != JOINT_METHOD else last
    try:
        return _find(
            *(spec, sent, replies, match), reference=reference, seed=seed, device=device, last=last, workers=workers
        )
    except Exception as error:
        if not (match.runs_the_model or isinstance(error, ValueError | RuntimeError)):
            raise
        what = f"{type(error).__name__}: {error}"  # as text: a log may keep its records, and an error its round
        log(WARNING, "rebasin: alignment failed (%s); the replies stay as they are", what)
        return Alignment([identity_perms(spec) for _ in replies], False, 0.0, 0.0, "nothing")


def _find(
    spec: PermutationSpec,
    sent: State,
    replies: Sequence[Reply],
    match: Matcher,
    *,
    reference: str,
    seed: int,
    device: torch.device | None,
    last: Sequence[Perms | None],
    workers: Workers,
) -> Alignment:
    certain: list[Perms | None] = [None] * len(replies)
    if reference in ("auto", "global"):
        certain = find_certain(match, sent, replies, last, workers)
    known: dict[str, Any] = {"certain": certain, "last": last, "workers": workers}
    if reference == "global":
        return _align_to_sent(sent, replies, match, how="the sent model", **known)
    # by chance a reply that was trained elsewhere has the sent model's order once in 10 ** log10_order cases
    sure = sum(reply.examples for reply, stays in zip(replies, certain, strict=True) if stays is not None)
    if sure > _half(replies) and spec.log10_order >= CERTAIN:
        count = sum(stays is not None for stays in certain)
        how = f"the sent model, since the order of {count} of {len(replies)} replies is certain"
        return _align_to_sent(sent, replies, match, how=how, **known)
    nearness = measure_nearness(spec, sent, [reply.tensors() for reply in replies], seed=seed)
    apart, how = _judge(replies, nearness)
    if reference == "auto" and not apart:
        return _align_to_sent(sent, replies, match, how=f"the sent model, since {how}", **known)
    largest = reference == "largest" or match.name != JOINT_METHOD
    failed: tuple[int, ...] = ()
    if largest:
        perms, gain, failed = _align_to_largest(spec, replies, match, workers)
    else:
        method = reference if reference in JOINT_REFERENCES else JOINT_REFERENCES[0]
        many = match.many(method, [reply.tensors() for reply in replies], shares(replies))
        perms, gain = list(many.perms), many.objective - many.objective_before
    if not apart:
        perms = _back_to_sent(spec, sent, replies, perms, seed=seed, device=device)
    towards = "the largest" if largest else f"each other ({method})"
    return Alignment(perms, apart, gain, _moved_fraction(perms), f"{towards}; {how}", failed=failed)


def _half(replies: Sequence[Reply]) -> float:
    return sum(reply.examples for reply in replies) / 2


def _judge(replies: Sequence[Reply], nearness: Sequence[Nearness]) -> tuple[bool, str]:
    examples = [reply.examples for reply in replies]
    near = sum(count for count, found in zip(examples, nearness, strict=True) if found.near)
    evidence = sorted(found.evidence for found in nearness)
    share = f"{sum(found.near for found in nearness)} of {len(nearness)} replies"
    apart = near < _half(replies)
    return apart, f"{share} are nearer to the sent model than their relabellings (z from {evidence[0]:.3g})"


def _align_to_sent(
    sent: State,
    replies: Sequence[Reply],
    match: Matcher,
    *,
    how: str,
    certain: Sequence[Perms | None],
    last: Sequence[Perms | None],
    workers: Workers,
) -> Alignment:
    found = match_to_one(match, sent, replies, certain=certain, last=last, workers=workers)
    reused, gain = 0, sum(matched.gain for matched in found)
    for matched, before, reply, known in zip(found, last, replies, certain, strict=True):
        if before is not None and matched.error is None and same_order(matched.perms, before):
            reused += 1
            gain += gain_of(match.setting.spec, sent, reply.tensors(), before) if known is not None else 0.0
    perms = [matched.perms for matched in found]
    how = f"{how}; {reused} as their node's last" if reused else how
    return Alignment(perms, False, gain / len(replies), _moved_fraction(perms), how, reused, _failed(found))


def _align_to_largest(
    spec: PermutationSpec, replies: Sequence[Reply], match: Matcher, workers: Workers
) -> tuple[list[Perms], float, tuple[int, ...]]:
    chosen = max(range(len(replies)), key=lambda place: replies[place].examples)
    reference, last = replies[chosen].tensors(), [None] * (len(replies) - 1)
    others = [reply for place, reply in enumerate(replies) if place != chosen]
    certain = find_certain(match, reference, others, last, workers)
    found = match_to_one(match, reference, others, certain=certain, last=last, workers=workers)
    gain = sum(matched.gain for matched in found) / max(1, len(found))
    found.insert(chosen, Matched(identity_perms(spec)))
    return [matched.perms for matched in found], gain, _failed(found)


def _failed(found: Sequence[Matched]) -> tuple[int, ...]:
    return tuple(place for place, matched in enumerate(found) if matched.error is not None)


def _back_to_sent(
    spec: PermutationSpec,
    sent: State,
    replies: Sequence[Reply],
    perms: list[Perms],
    *,
    seed: int,
    device: torch.device | None,
) -> list[Perms]:
    aligned = [permute(spec, perm, reply.tensors()) for perm, reply in zip(perms, replies, strict=True)]
    merged = merge(aligned, coefficients=shares(replies))
    back = weight_matching(spec, sent, merged, seed=seed, device=device).perms
    return [compose(spec, perm, back) for perm in perms]


def shares(replies: Sequence[Reply]) -> list[float]:
    """Each reply's share of the examples."""
    total = sum(reply.examples for reply in replies)
    return [reply.examples / total for reply in replies]


def _moved_fraction(perms: Sequence[Perms]) -> float:
    return sum(moved_fraction(one) for one in perms) / len(perms)
