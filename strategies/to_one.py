"""Replies matched to one reference, several at once; what fails for one of them costs that one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING

from flwr.common.logger import log
from torch import Tensor

from fedrebasin import identity_perms
from fedrebasin.allocator import return_freed_memory, size_of
from fedrebasin.errors import without_frames
from fedrebasin.matching.certificate import IdentityCertificate
from fedrebasin.matching.methods import JOINT_METHOD
from fedrebasin.strategies.matcher import Matcher
from fedrebasin.strategies.reply import Reply
from fedrebasin.strategies.trajectory import Permuted, better_start
from fedrebasin.strategies.workers import Workers

Perms = dict[str, Tensor]
State = Mapping[str, Tensor]
NO_WORKERS = Workers(1)


@dataclass(frozen=True)
class Matched:
    """What became of one reply.

    Attributes
    ----------
    perms : dict
        The identity where it failed.
    gain : float
        How much the matching objective gained.
    error : Exception or None
        Why there are no permutations.
    """

    perms: Perms
    gain: float = 0.0
    error: Exception | None = None


def find_certain(
    match: Matcher, reference: State, replies: Sequence[Reply], last: Sequence[Perms | None], workers: Workers
) -> list[Perms | None]:
    """For each reply an order that no single permutation improves: its node's last one, or its own; or None.

    Only weight matching has a proof of that; by another method nothing is certain.
    """
    if match.name != JOINT_METHOD:
        return [None] * len(replies)
    spec = match.setting.spec
    certificate = IdentityCertificate(spec, reference, device=match.setting.device)

    def by_last(place: int) -> Perms | None:
        before = last[place]
        holds = before is not None and certificate.holds(Permuted(spec, before, replies[place].tensors()))
        return before if holds else None

    def as_they_are(places: Sequence[int]) -> list[bool]:
        return certificate.holds_each([replies[place].tensors() for place in places])

    known = [place for place, before in enumerate(last) if before is not None]
    found = dict(zip(known, workers.map(by_last, known), strict=True))
    groups = workers.groups([place for place in range(len(replies)) if found.get(place) is None])
    for places, holds in zip(groups, workers.map(as_they_are, groups), strict=True):
        found.update((place, identity_perms(spec)) for place, held in zip(places, holds, strict=True) if held)
    return_freed_memory(size_of(reference))
    return [found.get(place) for place in range(len(replies))]


def match_to_one(
    match: Matcher,
    reference: State,
    replies: Sequence[Reply],
    *,
    certain: Sequence[Perms | None],
    last: Sequence[Perms | None],
    workers: Workers,
) -> list[Matched]:
    """Match the replies whose order is not certain.

    Parameters
    ----------
    match : Matcher
        One that runs the user's model, which is one object, looks at a reply after the other.
    reference : state dict
    replies : sequence of Reply
    certain : sequence of perms or None
        What :func:`find_certain` found.
    last : sequence of perms or None
        For each reply what its node's last one was permuted by.
    workers : Workers
        How many at once; the result does not depend on it.

    Raises
    ------
    Exception
        That of the first reply, if all of them failed: then it is not the replies' fault.
    """
    spec, seed, device = match.setting.spec, match.setting.seed, match.setting.device

    def one(place: int) -> Matched:
        known, start = certain[place], last[place]
        if known is not None:
            return Matched(known)
        state = replies[place].tensors()
        try:
            found = match(reference, state)
            if start is not None:
                found = better_start(spec, reference, state, found, start, seed=seed, device=device)
        except Exception as error:
            if not (match.runs_the_model or isinstance(error, ValueError | RuntimeError)):
                raise
            return Matched(identity_perms(spec), error=without_frames(error))
        return Matched(found.perms, found.objective - found.objective_before)

    found = (NO_WORKERS if match.runs_the_model else workers).map(one, range(len(replies)))
    return_freed_memory(size_of(reference))  # each worker kept some
    errors = [matched.error for matched in found if matched.error is not None]
    if errors and len(errors) == len(found):
        try:
            raise errors[0]
        finally:
            del errors, found  # or this frame holds the error, which holds this frame and all that the round is made of
    for reply, matched in zip(replies, found, strict=True):
        if matched.error is not None:
            what = f"{type(matched.error).__name__}: {matched.error}"
            log(WARNING, "rebasin: node %d's reply cannot be aligned (%s); left out of this round", reply.node, what)
    return found
