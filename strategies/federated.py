"""The server's side of what asks nodes: query rounds from inside the aggregation, and what they cost."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from logging import INFO, WARNING
from typing import Any, TypeVar

import torch
from flwr.app import ConfigRecord, Message
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedrebasin.corrections.federated import FEDERATED, Case, FederatedOptions, count_releases
from fedrebasin.corrections.queries import Query, drive, find_huge
from fedrebasin.corrections.votes import Votes, vote
from fedrebasin.errors import CalibrationError, RebasinError, UsageError
from fedrebasin.finite import first_not_finite
from fedrebasin.strategies.account import Account
from fedrebasin.strategies.messages import node_of_message, node_of_reply
from fedrebasin.strategies.queries import MESSAGE_TYPE, bytes_of, epsilon_of, read_answer, write_query
from fedrebasin.strategies.records import state_to_record

State = dict[str, Tensor]
Result = TypeVar("Result")
#: Flower's own default for a round
TIMEOUT = 3600.0


class Queries:
    """Asks the nodes of a round about their own data: to correct merged models by it, and to find the best of them.

    A node that fails, is late, refuses or sends what cannot be used is left out for the rest of the correction, with
    one log line, and one that is late for the rest of the round; where none is left, or the correction fails, the
    model stays as it is.

    Attributes
    ----------
    account : Account
        What nodes may have given away; a run gets its own.
    metrics : dict
        Of the round: ``rebasin-query-rounds``, ``rebasin-query-bytes`` (arrays as serialised, both ways, to and
        from all nodes), ``rebasin-query-left-out`` (nodes); if all nodes add noise, ``rebasin-query-epsilon``: the
        largest that one of them states for its answers in this run.
    """

    def __init__(
        self,
        net: nn.Module,
        example_inputs: Any,
        options: FederatedOptions,
        device: torch.device | None,
    ) -> None:
        self.account = Account()
        self.metrics: dict[str, int | float] = {}
        self._net, self._example, self._options, self._device = net, example_inputs, options, device
        self._configs: dict[int, dict[str, ConfigRecord]] = {}
        self._grid: Grid | None = None
        self._server_round, self._timeout = 0, TIMEOUT
        self._sent = self._received = 0
        self._left, self._late = set[int](), set[int]()

    def prepare(self, server_round: int, grid: Grid, messages: Iterable[Message], timeout: float) -> None:
        """Keep the grid of a round, what its nodes are told in training, and how many seconds a query round waits."""
        self._server_round, self._grid, self._timeout = server_round, grid, timeout
        self.metrics = {"rebasin-query-rounds": 0, "rebasin-query-bytes": 0, "rebasin-query-left-out": 0}
        self._left, self._late = set(), set()
        self._configs = {
            message.metadata.dst_node_id: dict(message.content.config_records.items()) for message in messages
        }

    def correct(
        self,
        correction: str,
        merged: State,
        ends: Sequence[State],
        coefficients: Sequence[float],
        nodes: Sequence[int],
    ) -> State | None:
        """Correct the merged model, or log why not and return ``None``.

        Parameters
        ----------
        correction : str
            A name of ``FEDERATED``.
        merged : state dict
        ends : sequence of state dict
            The aligned replies.
        coefficients : sequence of float
        nodes : sequence of int
            The node that sent each end.
        """
        case = Case(self._net, merged, ends, coefficients, self._example, self._options, self._device)
        try:
            found = self._drive(correction, FEDERATED[correction](case), ends, nodes)
        except Exception as error:  # noqa: BLE001 - the network, the user's model and numbers may raise anything
            what = type(error).__name__
            log(WARNING, "rebasin: %s failed (%s: %s); this round is not corrected", correction, what, error)
            return None
        bad = first_not_finite(found, merged)
        if bad is not None:
            log(WARNING, "rebasin: %s made %r infinite or NaN; this round is not corrected", correction, bad)
            return None
        return found

    def vote(self, candidates: Mapping[str, State], nodes: Sequence[int]) -> Votes:
        """Have the nodes measure state dicts on labelled data of their own.

        Raises
        ------
        RebasinError
            If no node gives an answer that can be used.
        """
        return self._drive("select='clients'", vote(candidates), [{} for _ in nodes], nodes)

    def _drive(
        self,
        what: str,
        steps: Generator[Query, dict[int, Any], Result],
        ends: Sequence[State],
        nodes: Sequence[int],
    ) -> Result:
        present = {place: node for place, node in enumerate(nodes) if node not in self._late}
        before = self.metrics["rebasin-query-rounds"]
        self._sent = self._received = 0
        try:
            return drive(steps, lambda query: self._ask(query, ends, present))
        finally:
            self.metrics["rebasin-query-bytes"] += self._sent + self._received
            self._left |= set(nodes) - set(present.values())
            self.metrics["rebasin-query-left-out"] = len(self._left)
            log(
                INFO,
                "aggregate_train: %s asked %d nodes in %d query rounds; %.1f kB sent, %.1f kB received",
                *(what, len(nodes), self.metrics["rebasin-query-rounds"] - before),
                *(self._sent / 1e3, self._received / 1e3),
            )

    def _ask(self, query: Query, ends: Sequence[State], present: dict[int, int]) -> dict[int, Any]:
        """One query round; nodes whose answers cannot be used are taken out of ``present``."""
        if self._grid is None:
            raise RebasinError("no grid: configure_train has not been called")
        if not present:
            raise RebasinError("no node has answered in time in this round")
        merged, group, messages = state_to_record(query.merged), str(self._server_round), []
        for place, node in present.items():
            end = state_to_record({name: ends[place][name] for name in query.end_names})
            content = write_query(query, merged, end, self._configs.get(node, {}), self.account.before)
            messages.append(Message(content, dst_node_id=node, message_type=MESSAGE_TYPE, group_id=group))
        with suppress(RebasinError):  # of answers without noise there is no account
            self.account.add(present.values(), count_releases(query.kind, query.about))
        self._sent += sum(bytes_of(message) for message in messages)
        self.metrics["rebasin-query-rounds"] += 1
        replies = list(self._grid.send_and_receive(messages, timeout=self._timeout))
        self._received += sum(bytes_of(reply) for reply in replies)
        asked = node_of_message(messages)
        of_node: dict[int, Message] = {}
        for reply in replies:
            of_node.setdefault(node_of_reply(reply, asked), reply)
        answers, epsilons = {}, dict[int, float | None]()
        for place, node in list(present.items()):
            try:
                if node not in of_node:
                    self._late.add(node)
                    raise RebasinError(f"nothing within {self._timeout:g} s")
                reply = of_node.pop(node)
                answers[place] = query.read(read_answer(reply))
                epsilons[place] = epsilon_of(reply)
            except RebasinError as error:
                self._leave_out(present, place, error)
        for place, usual in find_huge({place: query.size(found) for place, found in answers.items()}).items():
            size = query.size(answers.pop(place))
            self._leave_out(present, place, f"activations of size {size:.3g}, where the other nodes have {usual:.3g}")
        if not answers:
            raise RebasinError("no node gave an answer that can be used")
        stated = [epsilon for place in answers if (epsilon := epsilons[place]) is not None]
        if len(stated) == len(answers):  # where one node adds no noise, there is no bound for all
            self.metrics["rebasin-query-epsilon"] = max(stated)
        return answers

    def _leave_out(self, present: dict[int, int], place: int, reason: object) -> None:
        log(
            WARNING,
            "rebasin: node %d answered a query with %s; left out of the correction of round %d",
            *(present.pop(place), reason, self._server_round),
        )


def build_queries(
    corrections: Sequence[str | None],
    net: nn.Module | None,
    example_inputs: Any,
    options: FederatedOptions | None,
    device: torch.device | None,
    *,
    votes: bool = False,
) -> Queries | None:
    """Prepare federated corrections and see that the network has what they correct; ``None`` where nothing is asked.

    Raises
    ------
    UsageError
        If the model is missing, or options are given to another correction.
    RebasinError
        If the network has nothing to correct.

    Examples
    --------
    >>> build_queries(["repair"], nn.Linear(2, 1), None, None, None) is None
    True
    """
    asked = [name for name in corrections if name in FEDERATED]
    if not asked and options is not None:
        given = corrections[0] if len(corrections) == 1 else list(corrections)
        raise UsageError(f"federated: options for {', '.join(FEDERATED)} alone; got correction={given!r}")
    if not asked and not votes:
        return None
    if net is None:
        what = f"correction={asked[0]!r}" if asked else "select='clients'"
        raise UsageError(
            f"{what} runs the model's layers, and a spec alone cannot; give model= and example_inputs= too, or "
            "correction=None"
        )
    options = FederatedOptions() if options is None else options
    state = net.state_dict()
    for correction in asked:
        try:
            next(FEDERATED[correction](Case(net, state, [state], [1.0], example_inputs, options, device)))
        except RebasinError:
            raise
        except Exception as error:
            raise CalibrationError(f"example_inputs: the model cannot run on them: {error}") from error
    return Queries(net, example_inputs, options, device)
