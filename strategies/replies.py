"""Which replies of a round can be aggregated, and one log line for each that cannot.

A reply is left out, never an error of the run: Flower's own checks raise, and one bad node ends the training of
all. What is wrong with a single array is judged in ``arrays.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedrebasin import PermutationSpec
from fedrebasin.strategies.arrays import Measured, explain_keys, find_huge, measure_arrays, missing_and_extra
from fedrebasin.strategies.metrics import form_of, wrong_count
from fedrebasin.strategies.options import read_attribute
from fedrebasin.strategies.records import RecordView, record_to_state, select_arrays
from fedrebasin.strategies.wire import name_of_arrays
from fedrebasin.strategies.workers import Workers


@dataclass
class Reply:
    """One reply that takes part; its message holds one ArrayRecord, in the sent order, and one MetricRecord."""

    message: Message
    node: int
    examples: float
    arrays: ArrayRecord
    metrics: MetricRecord
    names: tuple[str, str]  # of these two records

    def state(self) -> dict[str, Tensor]:
        """Decode the arrays; each call makes new tensors, so that not all replies need be decoded at once."""
        return record_to_state(self.arrays)

    def tensors(self) -> Mapping[str, Tensor]:
        """The same for reading: no tensor is copied."""
        return RecordView(self.arrays)


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
        The tensors that are trained; running statistics are not held to the bound on size.
    """

    def __init__(
        self, arrayrecord_key: str, weighted_by_key: str, required_metrics: Sequence[str], parameters: Sequence[str]
    ) -> None:
        self.arrayrecord_key = arrayrecord_key
        self.weighted_by_key = weighted_by_key
        self.required_metrics = tuple(required_metrics)
        self.parameters = frozenset(parameters)
        self._explained = False

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
        for message in failures:
            node = nodes.get(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            if node != message.metadata.src_node_id:
                log(
                    WARNING,
                    "rebasin: the failure in round %d is node %d's: %s",
                    server_round,
                    node,
                    message.error.reason,
                )
        bad: dict[int, str] = {}
        found: list[tuple[int, Reply]] = []
        seen: set[int] = set()
        for place, message in enumerate(messages):
            if message.has_error():
                continue
            node = nodes.get(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            if node in seen:
                bad[place] = f"node {node} replied twice; its first reply is kept"
                continue
            seen.add(node)
            reply = self._parse(message, node)
            if isinstance(reply, str):
                bad[place] = f"node {node} sent {reply}"
            else:
                found.append((place, reply))
        found = self._with_the_sent_keys(found, sent, bad)
        measured: dict[int, dict[str, Measured]] = {}
        sizes = workers.map(lambda one: measure_arrays(one[1].arrays, sent), found)
        for (place, reply), wrong in zip(found, sizes, strict=True):
            if isinstance(wrong, str):
                bad[place] = f"node {reply.node} sent {wrong}"
            else:
                measured[place] = wrong
        for place, wrong in find_huge(measured, sent, self.parameters).items():
            bad[place] = f"node {dict(found)[place].node} sent {wrong}"
        kept = _in_order([reply for place, reply in found if place not in bad])
        for place in sorted(bad):
            if bad[place]:
                log(WARNING, "rebasin: %s; left out of round %d", bad[place], server_round)
        self._keep_common_metrics(kept)
        for reply in kept:
            reply.arrays = select_arrays(reply.arrays, list(sent))
            reply.names = kept[0].names
            _rewrite(reply)
        return Screened(kept, failures, len(bad))

    def _parse(self, message: Message, node: int) -> Reply | str:
        """Find the ArrayRecord and the MetricRecord, and the weight; or say what is missing."""
        if not message.has_content():
            return "an empty reply"
        arrays = message.content.array_records
        name = name_of_arrays(message.content, self.arrayrecord_key)
        if name is None:
            return f"{len(arrays)} ArrayRecords and none called {self.arrayrecord_key!r}"
        records = message.content.metric_records
        weighted = next((name for name, metrics in records.items() if self.weighted_by_key in metrics), None)
        if weighted is None:
            return f"no {self.weighted_by_key!r} in a MetricRecord"
        metrics = records[weighted]
        examples = metrics[self.weighted_by_key]
        wrong = wrong_count(self.weighted_by_key, examples)
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

    def _keep_common_metrics(self, kept: list[Reply]) -> None:
        """Reduce the metrics to those that all replies have, in one form: Flower raises where they differ."""
        if not kept:
            return
        forms = [form_of(reply.metrics) for reply in kept]
        common = {name for name, form in forms[0].items() if all(other.get(name, -1) == form for other in forms)}
        dropped = sorted({name for names in forms for name in names} - common)
        if dropped:
            log(WARNING, "rebasin: metrics that not all replies have are not aggregated: %s", ", ".join(dropped))
        for reply in kept:
            reply.metrics = MetricRecord({name: value for name, value in reply.metrics.items() if name in common})


def build_screen(strategy: Strategy, spec: PermutationSpec) -> ReplyScreen:
    """The screen for a strategy's keys and a spec's parameters."""
    train_loss_key = read_attribute(strategy, "train_loss_key", None)  # QFedAvg raises without it
    return ReplyScreen(
        str(read_attribute(strategy, "arrayrecord_key", "arrays")),
        str(read_attribute(strategy, "weighted_by_key", "num-examples")),
        [] if train_loss_key is None else [train_loss_key],
        spec.parameters,
    )


def _in_order(replies: list[Reply]) -> list[Reply]:
    """By partition, if all say theirs: node ids and arrival differ from run to run, and sums with their order."""
    partitions = [reply.metrics.get("partition-id") for reply in replies]
    numbers = [float(partition) for partition in partitions if isinstance(partition, int | float)]
    if len(numbers) < len(replies):
        return replies
    return [replies[place] for place in sorted(range(len(replies)), key=numbers.__getitem__)]


def _rewrite(reply: Reply) -> None:
    """Leave one ArrayRecord and one MetricRecord: the inner strategies refuse more, and pair them by name."""
    content = RecordDict({reply.names[0]: reply.arrays, reply.names[1]: reply.metrics})
    for name, config in reply.message.content.config_records.items():
        if name not in reply.names:  # another reply's name for its metrics: this one's would be gone
            content[name] = config
    reply.message.content = content
