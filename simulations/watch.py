"""A grid that counts which replies came and what was sent, and that shows those nodes only that take part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

#: what each reply says of itself besides the model, for the records of the run and not for the strategy
ABOUT = "about"


#: the message that :func:`partitions_of` sends
PARTITION_QUERY = "query.partition"


def partitions_of(grid: Grid) -> dict[int, int]:
    """Ask every node for its partition id; node ids differ in every run.

    Raises
    ------
    RuntimeError
        If a node does not answer.
    """
    asked = list(grid.get_node_ids())
    messages = [Message(RecordDict(), dst_node_id=node, message_type=PARTITION_QUERY) for node in asked]
    replies = [reply for reply in grid.send_and_receive(messages) if not reply.has_error()]
    if len(replies) < len(asked):
        raise RuntimeError(f"{len(replies)} of {len(asked)} nodes said which partition they have")
    return {reply.metadata.src_node_id: _partition(reply) for reply in replies}


class WatchedGrid(Grid):
    """Passes everything to ``grid`` and remembers the replies of the last round of training.

    Replies come in any order and node ids differ in every run; here they are sorted by partition id, so that sums
    over clients are the same bits in every run.

    Parameters
    ----------
    partitions : mapping of int to int, optional
        Node id -> partition id. With it, :meth:`open_round` says who is there in a round.
    on_replies : callable, optional
        Called with the good replies of each round of training, and with what each says of itself.
    """

    def __init__(
        self,
        grid: Grid,
        on_replies: Callable[[list[Message], list[dict[str, Any]]], None] | None = None,
        partitions: Mapping[int, int] | None = None,
    ) -> None:
        self.grid = grid
        self.on_replies = on_replies
        self.partitions = partitions or {}
        self.present: Collection[int] | None = None
        self.sent_bytes = self.received_bytes = 0
        self.expected = 0
        self.failures: list[str] = []
        self.nodes: list[dict[str, Any]] = []

    def open_round(self, present: Collection[int]) -> None:
        """From now on only these partitions are there, and bytes are counted anew."""
        self.present = present
        self.sent_bytes = self.received_bytes = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        sent = list(messages)
        if not sent:
            return []
        replies = list(self.grid.send_and_receive(sent, timeout=timeout))
        self.sent_bytes += sum(map(_array_bytes, sent))
        self.received_bytes += sum(map(_array_bytes, replies))
        if sent[0].metadata.message_type != "train":
            return replies
        self.expected = len(sent)
        self.failures = [str(reply.error.reason) for reply in replies if reply.has_error()]
        good = sorted((reply for reply in replies if not reply.has_error()), key=_partition)
        self.nodes = [dict(reply.content.pop(ABOUT)) for reply in good]
        if self.on_replies is not None:
            self.on_replies(good, self.nodes)
        return good + [reply for reply in replies if reply.has_error()]

    def set_run(self, *arguments: Any, **keywords: Any) -> None:
        self.grid.set_run(*arguments, **keywords)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        nodes = self.grid.get_node_ids()
        if self.present is None:
            return nodes
        return [node for node in nodes if self.partitions[node] in self.present]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)


def _partition(reply: Message) -> int:
    return int(str(reply.content.config_records[ABOUT]["node"]))


def _array_bytes(message: Message) -> int:
    """Models, and what queries bring of them; names, numbers and Flower's envelope are not counted."""
    if message.has_error():
        return 0
    return sum(record.count_bytes() for record in message.content.array_records.values())
