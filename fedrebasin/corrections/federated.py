"""Every federated correction by its name, and all of it in one process: the server's part and the nodes'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fedrebasin.corrections import federated_least_squares as _least_squares
from fedrebasin.corrections import federated_regmean as _regmean
from fedrebasin.corrections import federated_repair as _repair
from fedrebasin.corrections import votes as _votes
from fedrebasin.corrections.privacy import Privacy, check_apart
from fedrebasin.corrections.queries import About, Answer, Case, Correction, FederatedOptions, Node, Query, State, drive
from fedrebasin.errors import RebasinError

__all__ = ["FEDERATED", "Answer", "Case", "FederatedOptions", "Node", "Query", "answer", "correct_federated"]

FEDERATED: dict[str, Callable[[Case], Correction]] = {
    "federated-repair": _repair.federated_repair,
    "federated-least-squares": _least_squares.federated_least_squares,
    "federated-regmean": _regmean.federated_regmean,
}
_MEASURES: dict[str, Callable[[About, Node], Answer]] = {
    _repair.KIND: _repair.measure,
    _least_squares.KIND: _least_squares.measure,
    _regmean.KIND: _regmean.measure,
    _votes.KIND: _votes.measure,
}
_RELEASES: dict[str, Callable[[About], int]] = {
    _repair.KIND: _repair.count_releases,
    _least_squares.KIND: _least_squares.count_releases,
    _regmean.KIND: _regmean.count_releases,
}


@torch.inference_mode(False)
def answer(kind: str, about: About, node: Node) -> Answer:
    """Answer a query as a node does.

    Parameters
    ----------
    kind, about
        The query's.
    node : Node

    Returns
    -------
    dict of str to Tensor
        float64 sums and int64 counts.

    Raises
    ------
    RebasinError
        If the query is of no known kind, or the node's network or data do not fit it.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> node = Node(net, {}, net.state_dict(), [torch.tensor([[1.0, 2.0]])])
    >>> answer("grams", {"limit": 10**6}, node)["weight.gram"]
    tensor([1., 2., 1., 4., 2., 1.], dtype=torch.float64)
    """
    if kind not in _MEASURES:
        raise RebasinError(f"query: expected one of {', '.join(_MEASURES)}; got {kind!r}; update fedrebasin here")
    if node.privacy is not None:
        count_releases(kind, about)  # refuses what has no account
        check_apart(node.net)
    return _MEASURES[kind](about, node)


def count_releases(kind: str, about: About) -> int:
    """How many noised vectors a private node's answer to a query holds.

    Raises
    ------
    RebasinError
        If it cannot be told, or the answer has no noise.

    Examples
    --------
    >>> count_releases("moments", {"merged-sites": ["1"], "end-sites": ["1", "3"]})
    3
    """
    if kind not in _RELEASES:
        raise RebasinError(f"privacy: answers to {kind!r} are not noised, so that nothing accounts for them")
    return _RELEASES[kind](about)


@torch.inference_mode(False)
def correct_federated(name: str, case: Case, data: Sequence[Iterable[Any]], *, privacy: Privacy | None = None) -> State:
    """Run a federated correction where all data is at hand, by the very functions that server and nodes run.

    Parameters
    ----------
    name : str
        A name of ``FEDERATED``.
    case : Case
        The merged model, the aligned ends and their coefficients.
    data : sequence of batch collections
        Each node's own, in the order of ``case.ends``.
    privacy : Privacy, optional
        Every node's.

    Returns
    -------
    dict of str to Tensor
        The corrected state dict.

    Raises
    ------
    RebasinError
        If there is no such correction or an answer cannot be used; what the correction raises itself.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> state = net.state_dict()
    >>> case = Case(net, state, [state, state], [0.5, 0.5], torch.randn(2, 4))
    >>> list(correct_federated("federated-repair", case, [[torch.randn(200, 4)], [torch.randn(200, 4)]]))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if name not in FEDERATED:
        raise RebasinError(f"correction: expected one of {', '.join(FEDERATED)}; got {name!r}")
    if len(data) != len(case.ends):
        raise RebasinError(f"data: expected {len(case.ends)} collections of batches, one for each end; got {len(data)}")

    def ask(query: Query) -> dict[int, Any]:
        found = {}
        for place, batches in enumerate(data):
            end = {key: case.ends[place][key] for key in query.end_names}
            node = Node(case.net, query.merged, end, batches, case.device, privacy)
            found[place] = query.read(answer(query.kind, query.about, node))
        return found

    return drive(FEDERATED[name](case), ask)
