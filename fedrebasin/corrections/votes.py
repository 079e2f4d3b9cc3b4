"""Which of several models nodes find best: each measures all of them on labelled data that it has held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrebasin.corrections.queries import LARGEST, About, Answer, Node, Query, State, check_tensors
from fedrebasin.errors import RebasinError
from fedrebasin.yardsticks import ByLoss, mean_over_batches

KIND = "losses"
#: examples, and the mean loss of each candidate on them
Vote = tuple[int, Tensor]


@dataclass(frozen=True)
class Votes:
    """What the nodes found.

    Attributes
    ----------
    name : str
        The candidate with the lowest loss.
    figures : dict of str to float
        Mean loss of every candidate over the examples of all voters; NaN: it is out.
    examples, voters : int
    """

    name: str
    figures: dict[str, float]
    examples: int
    voters: int

    def __str__(self) -> str:
        table = ", ".join(f"{name} {figure:.4g}" for name, figure in self.figures.items())
        return f"{self.name} is kept; loss on {self.examples} examples of {self.voters} clients: {table}"


def vote(candidates: Mapping[str, State]) -> Generator[Query, dict[int, Any], Votes]:
    """Have every node measure the candidates, in one query that brings them all.

    Parameters
    ----------
    candidates : dict of str to state dict
        Of equal ones the first is kept.

    Yields
    ------
    Query
        Read into a :data:`Vote`.

    Returns
    -------
    Votes

    Raises
    ------
    RebasinError
        If there is no candidate, or none that is finite at most nodes.

    Examples
    --------
    >>> query = next(vote({"plain": {"w": torch.zeros(1)}, "aligned": {"w": torch.ones(1)}}))
    >>> query.about["candidates"], list(query.merged)
    (['plain', 'aligned'], ['0/w', '1/w'])
    """
    if not candidates:
        raise RebasinError("candidates: expected one state dict or more; got none")
    names = list(candidates)
    merged = {f"{place}/{key}": x for place, state in enumerate(candidates.values()) for key, x in state.items()}
    answers: dict[int, Vote] = yield Query(KIND, {"candidates": names}, merged, (), _reader(len(names)), _smallest)
    return tally(names, list(answers.values()))


def tally(names: Sequence[str], found: Sequence[Vote]) -> Votes:
    """Mean losses over all examples.

    A candidate whose loss is no number at more than half of the nodes is out; a node where one of the others' is none
    does not vote, because figures over different nodes do not compare.

    Examples
    --------
    >>> votes = [(10, torch.tensor([1.0, 2.0])), (30, torch.tensor([3.0, 2.0])), (5, torch.tensor([0.0, math.nan]))]
    >>> str(tally(["plain", "aligned"], votes))
    'aligned is kept; loss on 40 examples of 2 clients: plain 2.5, aligned 2'
    """
    losses = torch.stack([one.double() for _, one in found])
    counts = torch.tensor([count for count, _ in found], dtype=torch.float64, device="cpu")
    finite = losses.isfinite()
    stays = 2 * finite.sum(0) >= len(found)
    votes = finite[:, stays].all(1)
    if not bool(stays.any()) or not bool(votes.any()):
        raise RebasinError(f"candidates: none of {', '.join(names)} has a finite loss at most nodes")
    shares = counts[votes] / counts[votes].sum()
    means = (shares.unsqueeze(1) * losses[votes]).sum(0)
    figures = {name: float(mean) if stay else math.nan for name, mean, stay in zip(names, means, stays, strict=True)}
    best = min((name for name in names if not math.isnan(figures[name])), key=lambda name: figures[name])
    return Votes(best, figures, int(counts[votes].sum()), int(votes.sum()))


def measure(about: About, node: Node) -> Answer:
    """What a node answers: how many examples it measured on, and each candidate's mean loss."""
    names = about.get("candidates")
    if node.loss is None:
        raise RebasinError("loss: select='clients' needs held_out= and loss= of answer_queries")
    if not isinstance(names, list) or not names:
        raise RebasinError("query: expected the names of candidates")
    parts: list[State] = [{} for _ in names]
    for key, tensor in node.merged.items():
        place, _, name = key.partition("/")
        parts[int(place)][name] = tensor
    batches = node.data()
    if any(target is None for _, _, target in batches):
        raise RebasinError("held_out: expected batches with targets; some have none")
    yardstick = ByLoss(batches, node.loss)
    losses = [mean_over_batches(yardstick(node.model(part)), yardstick.sizes) for part in parts]
    return {
        "count": torch.tensor(sum(yardstick.sizes), device="cpu"),
        "losses": torch.tensor(losses, dtype=torch.float64, device="cpu"),
    }


def _reader(candidates: int) -> Callable[[Answer], Vote]:
    def read(answer: Answer) -> Vote:
        losses = answer.get("losses", torch.zeros(0, device="cpu"))
        check_tensors({**answer, "losses": losses.nan_to_num(0.0, 0.0, 0.0)}, {"count": (), "losses": (candidates,)})
        if int(answer["count"]) < 1:
            raise RebasinError("losses without examples")
        return int(answer["count"]), torch.where(losses.abs() < LARGEST, losses, math.nan)

    return read


def _smallest(found: Vote) -> float:
    """A node is known by the model that does best there: a candidate that does badly is no reason to leave it out."""
    finite = found[1][found[1].isfinite()]
    return float(finite.abs().min()) if len(finite) else 0.0
