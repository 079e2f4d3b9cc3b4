"""A grid that counts: which replies came, in which order they are handed on, and what was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

#: what each reply says of itself besides the model, for the records of the run and not for the strategy
ABOUT = "about"


class WatchedGrid(Grid):
    """Passes everything to ``grid`` and remembers the replies of the last round of training.

    Replies come in any order and node ids differ in every run; here they are sorted by partition id, so that sums
    over clients are the same bits in every run.
    """

    def __init__(self, grid: Grid, on_replies: Callable[[list[Message]], None] | None = None) -> None:
        self.grid = grid
        self.on_replies = on_replies
        self.expected = 0
        self.failures: list[str] = []
        self.nodes: list[dict[str, Any]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        sent = list(messages)
        if not sent:
            return []
        replies = list(self.grid.send_and_receive(sent, timeout=timeout))
        if sent[0].metadata.message_type != "train":
            return replies
        self.expected = len(sent)
        self.failures = [str(reply.error.reason) for reply in replies if reply.has_error()]
        good = sorted((reply for reply in replies if not reply.has_error()), key=_partition)
        self.nodes = [dict(reply.content.pop(ABOUT)) for reply in good]
        if self.on_replies is not None:
            self.on_replies(good)
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
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)


def _partition(reply: Message) -> int:
    return int(str(reply.content.config_records[ABOUT]["node"]))
