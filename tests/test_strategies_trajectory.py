"""A node that keeps an order of its own is matched once, and then certified round after round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flower_messages import MemoryGrid, State, answer, play_round, small_net, trained_copy
from flwr.app import ArrayRecord, Message
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg, Result
from test_strategies_exact import spec_of
from test_strategies_legacy import play

from fedrebasin import Matching, identity_perms, permute, random_perms, weight_matching
from fedrebasin.matching import each, methods
from fedrebasin.matching.result import inner_product
from fedrebasin.strategies import Rebasin, legacy
from fedrebasin.strategies.records import record_to_state
from fedrebasin.strategies.trajectory import MOST, Trajectories, better_start, same_order

SENT: State = small_net().state_dict()
NODES = 3


def strategy_with(**options: Any) -> Rebasin:
    return Rebasin(FedAvg(fraction_evaluate=0.0), spec=spec_of(), **options)


def own_orders(server_round: int, shift: int = 0, sent: State = SENT) -> list[State]:
    """Three models near the sent one, node i's units in the order i, whatever the round."""
    spec = spec_of()
    return [
        permute(spec, random_perms(spec, place + shift), trained_copy(sent, 10 * server_round + place, noise=0.01))
        for place in range(NODES)
    ]


def no_matching(*args: object, **kwargs: object) -> Matching:
    raise AssertionError("matched again")


@pytest.mark.parametrize("reference, moved", [("global", NODES), ("auto", NODES - 1)])  # one gives the common order
def test_nodes_that_keep_their_order_are_matched_in_the_first_round_alone(
    reference: str, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = strategy_with(reference=reference)
    arrays, metrics = play_round(strategy, SENT, own_orders(1))
    assert arrays is not None and metrics is not None and metrics["rebasin-reused"] == 0
    for module in (each, methods):
        monkeypatch.setattr(module, "weight_matching", no_matching)
    for number in (2, 3):
        sent = record_to_state(arrays)
        arrays, metrics = play_round(strategy, sent, own_orders(number), server_round=number)
        assert arrays is not None and metrics is not None and metrics["rebasin-reused"] == moved
        assert metrics["rebasin-moved-fraction"] > 0.5 and metrics["rebasin-objective-gain"] > 0  # type: ignore[operator]


def test_it_gives_what_is_found_without_a_memory() -> None:
    strategy = strategy_with(reference="global")
    play_round(strategy, SENT, own_orders(1))
    reused, metrics = play_round(strategy, SENT, own_orders(2), server_round=2)
    fresh, _ = play_round(strategy_with(reference="global"), SENT, own_orders(2), server_round=2)
    assert reused is not None and fresh is not None and metrics is not None and metrics["rebasin-reused"] == NODES
    assert {name: array.data for name, array in reused.items()} == {name: array.data for name, array in fresh.items()}


@pytest.mark.parametrize("states", [own_orders(2, shift=5), [trained_copy(SENT, place) for place in range(NODES)]])
def test_a_memory_that_no_longer_holds_changes_nothing(states: list[State]) -> None:
    strategy = strategy_with(reference="global")
    play_round(strategy, SENT, own_orders(1))
    found, metrics = play_round(strategy, SENT, [dict(state) for state in states], server_round=2)
    fresh, _ = play_round(strategy_with(reference="global"), SENT, states, server_round=2)
    assert found is not None and fresh is not None and metrics is not None and metrics["rebasin-reused"] == 0
    assert {name: array.data for name, array in found.items()} == {name: array.data for name, array in fresh.items()}


def test_the_better_one_of_the_last_and_the_new_permutations_is_taken() -> None:
    spec, planted = spec_of(), random_perms(spec_of(), 3)
    inverse = {name: order.argsort() for name, order in planted.items()}
    model = permute(spec, inverse, trained_copy(SENT, 1))
    stuck = inner_product(spec, SENT, model)
    poor = Matching(identity_perms(spec), stuck, stuck)
    better = better_start(spec, SENT, model, poor, planted, seed=0, device=None)
    assert same_order(better.perms, planted) and better.objective > stuck
    good = weight_matching(spec, SENT, model)
    assert better_start(spec, SENT, model, good, random_perms(spec, 4), seed=0, device=None) is good


def run(folder: Path | None, rounds: int, first_name: int) -> Result:
    """Nodes that ignore what they are sent, and have other names every time that the server is started."""

    def node(partition: int) -> Any:
        def train(message: Message) -> Message:
            number = int(message.content["config"]["server-round"])
            return answer(message, own_orders(number)[partition], 10 + partition, partition_id=partition)

        return train

    torch.manual_seed(0)
    strategy = Rebasin(
        FedAvg(fraction_evaluate=0.0, min_available_nodes=NODES, min_train_nodes=NODES),
        spec=spec_of(),
        reference="global",
        checkpoint_dir=folder,
    )
    grid = MemoryGrid({first_name - partition: node(partition) for partition in range(NODES)})
    return strategy.start(grid, ArrayRecord(dict(SENT)), num_rounds=rounds)  # type: ignore[arg-type]


def test_a_resumed_run_remembers_the_nodes_by_their_partitions(tmp_path: Path) -> None:
    uninterrupted = run(None, 3, 10)
    run(tmp_path, 2, 20)
    resumed = run(tmp_path, 3, 30)
    assert [resumed.train_metrics_clientapp[number]["rebasin-reused"] for number in (1, 2, 3)] == [0, NODES, NODES]
    assert {name: array.data for name, array in resumed.arrays.items()} == {
        name: array.data for name, array in uninterrupted.arrays.items()
    }


def test_the_older_interface_remembers_too() -> None:
    strategy = legacy.Rebasin(LegacyFedAvg(), model=small_net, example_inputs=(torch.randn(4, 5),), reference="global")
    for number, expected in ((1, 0), (2, NODES)):
        _, metrics = play(strategy, SENT, own_orders(number), number)
        assert metrics["rebasin-reused"] == expected


def test_permutations_of_another_part_of_the_model_are_not_used_and_old_ones_are_dropped() -> None:
    class Known:
        def __init__(self, node: int) -> None:
            self.node, self.metrics = node, {}

    spec, memory = spec_of(), Trajectories()
    replies: Any = [Known(node) for node in range(MOST + 2)]
    memory.remember([random_perms(spec, 1)] * len(replies), replies)
    kept = memory.last(spec, replies)
    assert [perms is None for perms in kept] == [True, True] + [False] * MOST
    memory.load_state_dict({"node 7": ArrayRecord({"0": torch.tensor([0, 0])})})
    assert memory.last(spec, replies[7:8]) == [None]
