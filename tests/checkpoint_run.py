"""A run with checkpoints whose nodes change names and speed every time; as a script it is killed where it is told."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flower_messages import MemoryGrid, answer, small_net, trained_copy
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Result,
    Strategy,
)

from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import record_to_state

NODES, ROUNDS = 3, 4
INNER: dict[str, Callable[[], Strategy]] = {
    "adam": lambda: FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99),
    "momentum": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    "privacy": lambda: DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(), noise_multiplier=0.2, num_sampled_clients=NODES
    ),
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(inner: str, folder: Path | None, *, rounds: int = ROUNDS, kill_at: str = "", width: int = 12) -> Result:
    """The federation from its start; ``kill_at`` is ``"train 3"``, ``"between 3"`` or ``"saving 3"``."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    names = random.SystemRandom().sample(range(1, 10**6), NODES)
    place, _, number = kill_at.partition(" ")

    def node(partition: int) -> Callable[[Message], Message]:
        def train(message: Message) -> Message:
            server_round = int(message.content["config"]["server-round"])
            if place == "train" and partition == 1 and server_round == int(number):
                kill()
            sent = record_to_state(message.content["arrays"])
            trained = trained_copy(sent, 100 * server_round + partition)
            return answer(message, trained, 10 + partition, partition_id=partition, loss=1 / server_round)

        return train

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if place == "saving" and server_round == int(number):
            Path.rename = lambda *_: kill()  # type: ignore[assignment, misc]
        return MetricRecord({"round": server_round, "sum": float(arrays["0.weight"].numpy().sum())})

    class Grid(MemoryGrid):
        def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            messages = list(messages)
            rounds_sent = {int(message.content["config"]["server-round"]) for message in messages}
            if place == "between" and rounds_sent == {int(number)}:
                kill()
            return super().send_and_receive(messages, timeout=timeout)

    net = small_net(width)
    strategy = Rebasin(INNER[inner](), model=net, example_inputs=(torch.randn(4, 5),), checkpoint_dir=folder)
    strategy.strategy.__dict__.setdefault("fraction_evaluate", 0.0)
    for link in (strategy.strategy, getattr(strategy.strategy, "strategy", strategy.strategy)):
        link.__dict__.update(fraction_evaluate=0.0, min_available_nodes=NODES, min_train_nodes=NODES)
    grid = Grid({name: node(partition) for partition, name in enumerate(names)})
    initial = ArrayRecord(small_net(width, seed=3).state_dict())
    return strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=evaluate)


def to_bytes(record: ArrayRecord) -> dict[str, bytes]:
    return {name: array.numpy().tobytes() for name, array in record.items()}


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), kill_at=sys.argv[3])
