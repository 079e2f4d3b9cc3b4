"""Which replies of a round can be aggregated, and one log line for each that cannot.

A reply is left out, never an error of the run: Flower's own checks raise, and one bad node ends the training of
all. What is wrong with a single array is judged in ``arrays.py``, of a number of examples in ``metrics.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy

from fedrebasin import PermutationSpec
from fedrebasin.strategies.arrays import (
    Measured,
    explain_keys,
    find_huge,
    is_unchanged,
    measure_arrays,
    missing_and_extra,
)
from fedrebasin.strategies.inner import is_own, is_private, read_attribute
from fedrebasin.strategies.messages import node_of_reply
from fedrebasin.strategies.metrics import wrong_count
from fedrebasin.strategies.records import select_arrays
from fedrebasin.strategies.reply import Reply, in_order, keep_common_metrics
from fedrebasin.strategies.wire import name_of_arrays
from fedrebasin.strategies.workers import Workers

_NO_METRICS = "rebasin-metrics"  # what the metrics of a reply without a MetricRecord are called


@dataclass(frozen=True)
class Screened:
    """The replies that take part, those that carry an error, and how many were left out."""

    replies: list[Reply]
    failures: list[Message]
    left_out: int


class ReplyScreen:
    """Tell good replies from bad ones; remembers only what it has explained already.

    Parameters
    ----------
    arrayrecord_key, weighted_by_key : str
        The inner strategy's.
    required_metrics : sequence of str
        Further metrics without which the inner strategy raises (QFedAvg's training loss).
    parameters : sequence of str
        The tensors that are trained; running statistics are held to a bound of their own.
    reader : str
        The inner strategy's class, where it gets further records of the replies as well.
    private : bool
        No reply is measured by the others.
    equal : bool
        The inner strategy names no ``weighted_by_key``: where no reply of a round has it, all weigh the same.
    """

    def __init__(
        self,
        arrayrecord_key: str,
        weighted_by_key: str,
        required_metrics: Sequence[str],
        parameters: Sequence[str],
        reader: str = "",
        *,
        private: bool = False,
        equal: bool = False,
    ) -> None:
        self.arrayrecord_key = arrayrecord_key
        self.weighted_by_key = weighted_by_key
        self.required_metrics = tuple(required_metrics)
        self.parameters = frozenset(parameters)
        self.reader = reader
        self.private = private
        self.equal = equal
        self._explained = self._told = False

    def screen(
        self,
        server_round: int,
        messages: Sequence[Message],
        sent: ArrayRecord,
        nodes: Mapping[str, int],
        workers: Workers,
    ) -> Screened:
        """Part the messages of a round.

        Parameters
        ----------
        server_round : int
        messages : sequence of Message
        sent : ArrayRecord
            The model that was sent: the replies must have its keys, shapes and dtypes.
        nodes : mapping of str to int
            The node to which each message id of this round went: an error that Flower makes for a lost
            node names node 1.
        workers : Workers
            How many replies are read at once.

        Notes
        -----
        The contents of the messages that take part are rewritten in place, as in Flower's own wrappers.
        """
        failures = [message for message in messages if message.has_error()]
        _tell_failures(server_round, failures, nodes)
        found, bad = self._parse_all(messages, nodes)
        found = self._with_the_sent_keys(found, sent, bad)
        measured: dict[int, dict[str, Measured]] = {}
        sizes = workers.map(lambda one: measure_arrays(one[1].arrays, sent), found)
        for (place, reply), wrong in zip(found, sizes, strict=True):
            if isinstance(wrong, str):
                bad[place] = f"node {reply.node} sent {wrong}"
            elif self.private and is_unchanged(reply.arrays, sent, self.parameters):
                bad[place] = f"node {reply.node} sent the model as it was, and Flower's clipping divides by the change"
            else:
                measured[place] = wrong
        for place, wrong in find_huge(measured, sent, self.parameters, alone=self.private).items():
            bad[place] = f"node {dict(found)[place].node} sent {wrong}"
        kept = in_order([reply for place, reply in found if place not in bad])
        for place in sorted(bad):
            if bad[place]:
                log(WARNING, "rebasin: %s; left out of round %d", bad[place], server_round)
        keep_common_metrics(kept)
        for reply in kept:
            reply.arrays = select_arrays(reply.arrays, list(sent))
            reply.rewrite(kept[0].names, whole=bool(self.reader))
        self._tell_what_stays(kept)
        return Screened(kept, failures, len(bad))

    def _parse_all(
        self, messages: Sequence[Message], nodes: Mapping[str, int]
    ) -> tuple[list[tuple[int, Reply]], dict[int, str]]:
        """The replies that can be read, with their places among the messages; and what is wrong with the others."""
        found: list[tuple[int, Reply]] = []
        bad: dict[int, str] = {}
        key = None if self.equal and not any(map(self._is_weighted, messages)) else self.weighted_by_key
        seen: set[int] = set()
        for place, message in enumerate(messages):
            if message.has_error():
                continue
            node = node_of_reply(message, nodes)
            if node in seen:
                bad[place] = f"node {node} replied twice; its first reply is kept"
                continue
            seen.add(node)
            reply = self._parse(message, node, key)
            if isinstance(reply, str):
                bad[place] = f"node {node} sent {reply}"
            else:
                found.append((place, reply))
        return found, bad

    def _is_weighted(self, message: Message) -> bool:
        records = {} if message.has_error() or not message.has_content() else message.content.metric_records
        return any(self.weighted_by_key in metrics for metrics in records.values())

    def _parse(self, message: Message, node: int, key: str | None) -> Reply | str:
        """Find the ArrayRecord and the MetricRecord, and the weight; or say what is missing."""
        if not message.has_content():
            return "an empty reply"
        arrays = message.content.array_records
        name = name_of_arrays(message.content, self.arrayrecord_key)
        if name is None:
            return f"{len(arrays)} ArrayRecords and none called {self.arrayrecord_key!r}"
        records = message.content.metric_records
        weighted = next((name for name, metrics in records.items() if key is None or key in metrics), None)
        if weighted is None and key is not None:
            return f"no {key!r} in a MetricRecord"
        weighted = _NO_METRICS if weighted is None else weighted
        metrics = records.get(weighted, MetricRecord())
        examples = 1 if key is None else metrics[key]
        wrong = wrong_count(str(key), examples)
        if wrong or isinstance(examples, list):
            return wrong
        missing = [name for name in self.required_metrics if name not in metrics]
        if missing:
            return f"no metric {missing[0]!r}, which the inner strategy needs"
        for required in self.required_metrics:
            value = metrics[required]
            if isinstance(value, list) or not 0 <= value < math.inf:
                return f"{required!r} = {value}; the inner strategy needs a finite number from 0"
        return Reply(message, node, float(examples), arrays[name], metrics, (name, weighted))

    def _with_the_sent_keys(
        self, found: list[tuple[int, Reply]], sent: ArrayRecord, bad: dict[int, str]
    ) -> list[tuple[int, Reply]]:
        right = [(place, reply) for place, reply in found if reply.arrays.keys() == sent.keys()]
        wrong = [(place, reply) for place, reply in found if reply.arrays.keys() != sent.keys()]
        for place, reply in wrong:
            bad[place] = f"node {reply.node} sent {missing_and_extra(reply.arrays, sent)}"
        same = {frozenset(reply.arrays) for _, reply in wrong}
        # all alike: the clients' code, not a node's fault; one explanation instead of a line each
        if not right and len(same) == 1:
            bad.update({place: "" for place, _ in wrong})
            explanation = "their keys, as explained before"
            if not self._explained:
                explanation = explain_keys(wrong[0][1].arrays, sent)
                self._explained = True
            log(WARNING, "rebasin: all %d replies are left out: %s", len(wrong), explanation)
        return right

    def _tell_what_stays(self, kept: Sequence[Reply]) -> None:
        """Log once which arrays the inner strategy reads in each node's own order of the units."""
        names = {name for reply in kept for name, record in reply.further.items() if isinstance(record, ArrayRecord)}
        if names and not self._told:
            self._told = True
            log(
                WARNING,
                "rebasin: %s gets %s as the nodes sent it: its units do not move with the weights; with beside=%r "
                "Rebasin takes it out, permutes and averages it",
                *(self.reader, ", ".join(map(repr, sorted(names))), tuple(sorted(names))),
            )


def _tell_failures(server_round: int, failures: Sequence[Message], nodes: Mapping[str, int]) -> None:
    for message in failures:
        node = node_of_reply(message, nodes)
        if node != message.metadata.src_node_id:
            reason = message.error.reason
            log(WARNING, "rebasin: the failure in round %d is node %d's: %s", server_round, node, reason)


def build_screen(strategy: Strategy, spec: PermutationSpec) -> ReplyScreen:
    """The screen for a strategy's keys and a spec's parameters."""
    weighted_by_key = read_attribute(strategy, "weighted_by_key", None)
    train_loss_key = read_attribute(strategy, "train_loss_key", None)  # QFedAvg raises without it
    return ReplyScreen(
        str(read_attribute(strategy, "arrayrecord_key", "arrays")),
        "num-examples" if weighted_by_key is None else str(weighted_by_key),
        [] if train_loss_key is None else [train_loss_key],
        spec.parameters,
        type(strategy).__name__ if is_own(strategy, "aggregate_train") else "",
        private=is_private(strategy),
        equal=weighted_by_key is None,
    )
