"""Who takes part in which round: the schedule, the grid that keeps to it, and both in Flower's real runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flower_messages import MemoryGrid, Node, fail
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedrebasin.errors import UsageError
from fedrebasin.simulations.attendance import (
    attendance,
    check_nodes,
    fewest,
    first_round,
    local_epochs,
    trains_apart,
)
from fedrebasin.simulations.compare import Options, compare
from fedrebasin.simulations.results import load_results
from fedrebasin.simulations.settings import Settings, from_run_config, resolve, to_run_config
from fedrebasin.simulations.watch import ABOUT, WatchedGrid, partitions_of


def schedule(settings: Settings, nodes: int, seed: int = 0) -> list[list[int]]:
    return [attendance(settings, nodes, seed=seed, server_round=number) for number in range(1, settings.rounds + 1)]


@pytest.mark.parametrize("start", ["apart", "common"])
def test_without_absences_everybody_is_there_in_every_round(start: str) -> None:
    assert schedule(Settings(start=start, rounds=9), 5, seed=3) == [[0, 1, 2, 3, 4]] * 9


def test_nodes_are_absent_as_often_as_they_should_be() -> None:
    settings = Settings(absent=0.3, rounds=2000)
    there = np.array([[node in row for node in range(10)] for row in schedule(settings, 10)])
    # 20,000 draws: the standard deviation of their mean is 0.003, that of one node's 0.01
    assert abs(there.mean() - 0.7) < 0.013
    assert np.abs(there.mean(0) - 0.7).max() < 0.05
    # one node's absences say nothing of another's, nor of its own next round
    assert np.abs(np.corrcoef(there.T) - np.eye(10)).max() < 0.12
    assert abs(np.corrcoef(there[1:, 0], there[:-1, 0])[0, 1]) < 0.12


@pytest.mark.parametrize("absent", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("start", ["common", "joins:7"])
def test_at_least_two_stay_in_ascending_order(absent: float, start: str) -> None:
    for row in schedule(Settings(start=start, absent=absent, rounds=200), 3):
        assert len(row) >= 2
        assert row == sorted(set(row))
        assert set(row) <= {0, 1, 2}


def test_the_draw_depends_on_seed_and_round_alone() -> None:
    settings = Settings(absent=0.5, rounds=20)
    rows = schedule(settings, 6)
    assert rows == schedule(Settings(absent=0.5, rounds=20, strategies="fedadam", model="conv", epochs=7), 6)
    assert rows[:5] == schedule(Settings(absent=0.5, rounds=5), 6)
    assert rows != schedule(settings, 6, seed=1)
    assert len(set(map(tuple, rows))) > 10


def test_who_is_absent_at_a_small_probability_is_absent_at_a_larger_one() -> None:
    some, many = (schedule(Settings(absent=absent, rounds=50), 8) for absent in (0.2, 0.6))
    assert all(set(later) <= set(before) for later, before in zip(many, some, strict=True))
    assert some != many


@pytest.mark.parametrize("absent", [0.0, 0.6])
def test_the_silo_that_joins_is_absent_before_its_round_and_present_in_it(absent: float) -> None:
    for seed in range(20):
        rows = schedule(Settings(start="joins:3", absent=absent, rounds=6), 5, seed=seed)
        assert [4 in row for row in rows[:3]] == [False, False, True]
    # what the others do does not depend on it
    joins, common = (schedule(Settings(start=start, absent=0.3, rounds=40), 9) for start in ("joins:20", "common"))
    assert [set(row) - {8} for row in joins] == [set(row) - {8} for row in common]


def test_a_silo_trains_apart_once_when_it_first_takes_part() -> None:
    for start, alone in (("apart", {0, 1, 2, 3}), ("joins:3", {3}), ("common", set[int]())):
        settings = Settings(start=start, absent=0.4, rounds=8, epochs=40, later_epochs=5)
        rows = schedule(settings, 4)
        for node in range(4):
            came = [number for number, row in enumerate(rows, 1) if node in row]
            assert first_round(settings, 4, node, seed=0) == came[0]
            apart = [number for number in came if trains_apart(settings, 4, node, seed=0, server_round=number)]
            assert apart == (came[:1] if node in alone else [])
            epochs = [local_epochs(settings, 4, node, seed=0, server_round=number) for number in came]
            opening = {1} if start == "common" else set(apart)
            assert epochs == [40 if number in opening else 5 for number in came]


def test_a_node_that_never_comes_has_no_first_round() -> None:
    settings = Settings(absent=0.99, rounds=1)
    (row,) = schedule(settings, 4)
    missing = sorted(set(range(4)) - set(row))
    assert [first_round(settings, 4, node, seed=0) for node in missing] == [2, 2]


def test_the_fewest_are_those_of_the_emptiest_round_of_any_seed() -> None:
    settings = Settings(absent=0.3, rounds=5)
    sizes = [[len(row) for row in schedule(settings, 8, seed)] for seed in range(3)]
    assert fewest(settings, 8, [0, 1, 2]) == min(map(min, sizes))
    assert fewest(settings, 8, [1]) == min(sizes[1])
    assert fewest(Settings(start="joins:2"), 4, [0]) == 3


def test_a_silo_cannot_join_a_federation_of_one() -> None:
    check_nodes(Settings(start="common"), 2)
    with pytest.raises(UsageError, match="--nodes: expected at least 3 where one of them joins later; got 2"):
        check_nodes(Settings(start="joins:3"), 2)


def test_the_schedule_survives_the_way_through_a_run_config() -> None:
    settings = resolve(Settings(start="joins:3", absent=0.25))
    assert from_run_config(to_run_config(settings)) == settings
    assert settings.line_up == ["fedavg", "fedrebasin", "fedavg@common"]
    # the silo that joins trains as long as one that starts apart
    assert (settings.epochs, settings.later_epochs) == (40, 5)


#: node id -> partition id
PARTITIONS = {70: 2, 71: 1, 72: 0}


def holder(node: int, *, broken: bool = False) -> Node:
    """A node that sends back the model that it got, and says which partition it holds."""

    def reply(message: Message) -> Message:
        TaskIdentity.node_id = node  # of whom the reply says that it comes
        try:
            if broken:
                return fail(message)
            content = RecordDict(dict(message.content.array_records))
            content[ABOUT] = ConfigRecord({"node": PARTITIONS[node]})
            return Message(content, reply_to=message)
        finally:
            TaskIdentity.node_id = 1

    return reply


def test_a_grid_shows_those_who_are_there_and_counts_the_bytes_of_their_models() -> None:
    grid = MemoryGrid({node: holder(node) for node in PARTITIONS})
    partitions = partitions_of(grid)
    assert partitions == PARTITIONS
    seen: list[list[int]] = []
    watched = WatchedGrid(grid, lambda replies, abouts: seen.append([about["node"] for about in abouts]), partitions)
    assert watched.get_node_ids() == [70, 71, 72]
    for present, nodes in (([0, 2], [70, 72]), ([1], [71])):
        watched.open_round(present)
        assert list(watched.get_node_ids()) == nodes
        arrays = ArrayRecord([np.zeros((5, 3), np.float32), np.zeros(4, np.int64)])
        messages = [Message(RecordDict({"arrays": arrays}), dst_node_id=node, message_type="train") for node in nodes]
        watched.send_and_receive(messages)
        size = arrays.count_bytes()
        assert size >= 60 + 32
        assert (watched.sent_bytes, watched.received_bytes) == (size * len(nodes), size * len(nodes))
    assert seen == [[0, 2], [1]]


def test_a_node_that_does_not_say_its_partition_ends_the_run() -> None:
    grid = MemoryGrid({node: holder(node, broken=node == 71) for node in PARTITIONS})
    with pytest.raises(RuntimeError, match="2 of 3 nodes said which partition they have"):
        partitions_of(grid)


@pytest.mark.slow
def test_in_flowers_runtime_those_reply_who_should(tmp_path: Path) -> None:
    settings = Settings(
        rounds=4, partition="iid", start="joins:3", absent=0.4, width=8, epochs=3, later_epochs=1, seeds="0,1"
    )
    results = load_results(compare(Options(settings, nodes=4, output=tmp_path / "out")) / "results.json")
    for run in results["runs"]:
        rounds = run["rounds"][1:]
        assert [[node["node"] for node in row["nodes"]] for row in rounds] == schedule(settings, 4, run["seed"])
        common = run["strategy"] == "fedavg@common"
        apart = [(row["round"], node["node"]) for row in rounds for node in row["nodes"] if node["apart"]]
        assert apart == ([] if common else [(3, 3)])
        one = rounds[0]["sent_bytes"] / len(rounds[0]["nodes"])
        for row in rounds:
            assert row["sent_bytes"] == one * len(row["nodes"])
            assert row["received_bytes"] == pytest.approx(row["sent_bytes"])
    losses = {
        run["strategy"]: {node["node"]: node["train-loss"] for node in run["rounds"][3]["nodes"]}
        for run in results["runs"]
        if run["seed"] == 0
    }
    # until the silo joins every strategy sends the weights that the first one sent, and they are trained once
    for run in results["runs"]:
        reused = {node["reused"] for row in run["rounds"][1:3] for node in row["nodes"]}
        assert reused == {run["strategy"] != "fedavg"}
    # the silo that joins sends the same weights to every strategy that takes it as it is
    assert losses["fedavg"][3] == losses["fedrebasin"][3] != losses["fedavg@common"][3]
    entry = results["baselines"][0]
    assert entry["joins"]["node"] == 3
    assert [client["node"] for client in entry["clients"]] == [0, 1, 2, 3]
