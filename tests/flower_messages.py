"""Real Flower messages outside a run: a grid in memory whose nodes are plain functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from uuid import uuid4

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.logger import FLOWER_LOGGER
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedrebasin.strategies.records import state_to_record

State = dict[str, Tensor]
Node = Callable[[Message], Message]


def outside_a_run() -> None:
    """Give this process the identity without which flwr >= 1.38 makes no message."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class MemoryGrid(Grid):
    """A grid whose nodes answer at once; node ids are the mapping's keys."""

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        outside_a_run()
        self.nodes = dict(nodes)

    def set_run(self, run_id: int) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        del timeout
        replies = []
        for message in sorted(messages, key=lambda message: message.metadata.dst_node_id):
            message.metadata.__dict__["_message_id"] = str(uuid4())  # as the SuperLink does
            replies.append(self.nodes[message.metadata.dst_node_id](message))
        return replies


def answer(
    message: Message, state: State | ArrayRecord, examples: float | None = 10, **metrics: float | list[float]
) -> Message:
    """The reply of a node that trained ``state``."""
    record = state if isinstance(state, ArrayRecord) else state_to_record(state)
    values: dict[str, Any] = {} if examples is None else {"num-examples": examples}
    values |= {name.replace("_", "-") if name != "train_loss" else name: value for name, value in metrics.items()}
    return Message(RecordDict({"arrays": record, "metrics": MetricRecord(values)}), reply_to=message)


def fail(message: Message, reason: str = "node lost") -> Message:
    """The reply that Flower makes for a node that raised."""
    return Message(Error(code=0, reason=reason), reply_to=message)


def configure(strategy: Any, sent: State, nodes: int, server_round: int = 1) -> list[Message]:
    """The messages of one round, as the nodes get them."""
    grid = MemoryGrid({node: lambda message: message for node in range(1, nodes + 1)})
    messages = list(strategy.configure_train(server_round, state_to_record(sent), ConfigRecord(), grid))
    messages.sort(key=lambda message: message.metadata.dst_node_id)
    for message in messages:
        message.metadata.__dict__["_message_id"] = str(uuid4())
    return messages


def play_round(
    strategy: Any, sent: State, states: list[State], examples: list[float] | None = None, server_round: int = 1
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """One round in which node i answers with ``states[i]``."""
    messages = configure(strategy, sent, len(states), server_round)
    counts = examples or [10.0 * (place + 1) for place in range(len(states))]
    replies = [
        answer(message, state, count, train_loss=0.5 + place)
        for place, (message, state, count) in enumerate(zip(messages, states, counts, strict=True))
    ]
    arrays, metrics = strategy.aggregate_train(server_round, replies)
    return arrays, metrics


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Flower's log lines from WARNING up."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                lines.append(record.getMessage())

    handler = Keep()
    FLOWER_LOGGER.addHandler(handler)
    yield lines
    FLOWER_LOGGER.removeHandler(handler)


def small_net(width: int = 12, *, norm: bool = True, seed: int = 0) -> nn.Module:
    """A small network with biases, and with BatchNorm if asked."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width - 3)]
    if not norm:
        del layers[1]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width - 3, 3))


def trained_copy(state: State, seed: int, noise: float = 0.05) -> State:
    """A model a little away from ``state``, with statistics and counters of its own."""
    generator = torch.Generator().manual_seed(seed)
    moved: State = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            moved[name] = tensor + seed
        else:
            step = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            moved[name] = tensor + noise * step
            if name.endswith("running_var"):
                moved[name] = moved[name].abs() + 0.1
    return moved
