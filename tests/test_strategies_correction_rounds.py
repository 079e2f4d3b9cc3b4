"""correction_rounds: a correction, or a choice, that follows some of the rounds and not the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated_clients import GIVEN, Spy, client
from federated_clients import SENT as GIVEN_SENT
from flower_messages import MemoryGrid, State, answer, play_round, small_net, trained_copy, warnings
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.server import strategy as legacy_flower
from test_strategies_exact import same_bytes

from fedrebasin import RebasinError
from fedrebasin.simulations.competitors import label_of, make_strategy, parse_strategies
from fedrebasin.simulations.settings import Settings, resolve
from fedrebasin.strategies import FedRebasin, legacy
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

INPUTS = (torch.randn(4, 5),)
SENT: State = small_net().state_dict()


def strategy(**options: Any) -> FedRebasin:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(100, 5, generator=generator) for _ in range(3)]
    given: dict[str, Any] = {"model": small_net, "example_inputs": INPUTS, "calibration": batches}
    return FedRebasin(**given, fraction_evaluate=0.0, **options)


def node(partition: int) -> Callable[[Message], Message]:
    def train(message: Message) -> Message:
        number = int(message.content["config"]["server-round"])
        sent = record_to_state(message.content["arrays"])
        return answer(message, trained_copy(sent, 10 * number + partition), 10, partition_id=partition)

    return train


def run(rounds: int = 3, made: FedRebasin | None = None, **options: Any) -> list[ArrayRecord]:
    """What each round hands back."""
    models: list[ArrayRecord] = []

    def keep(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round > 0:
            models.append(arrays)
        return MetricRecord({"round": server_round})

    grid = MemoryGrid({place + 1: node(place) for place in range(2)})
    (made or strategy(**options)).start(grid, ArrayRecord(SENT), num_rounds=rounds, evaluate_fn=keep)
    return models


@pytest.mark.parametrize("rounds", [[2], range(2, 3), {np.int64(2)}])
def test_the_rounds_that_are_named_are_corrected_and_no_others(rounds: Any) -> None:
    states = [trained_copy(SENT, seed) for seed in (1, 2)]
    for number in (1, 2, 3):
        found, _ = play_round(strategy(correction_rounds=rounds), SENT, states, server_round=number)
        wanted, _ = play_round(strategy(correction="repair" if number == 2 else None), SENT, states)
        other, _ = play_round(strategy(correction=None if number == 2 else "repair"), SENT, states)
        assert found is not None and wanted is not None and other is not None
        assert same_bytes(found, wanted) and not same_bytes(found, other)


def test_the_clients_train_on_from_what_a_round_hands_back() -> None:
    corrected, plain, first, last = (run(**one) for one in ({}, {"correction": None}, rounds(1), rounds(3)))
    assert same_bytes(first[0], corrected[0]) and not same_bytes(first[1], corrected[1])
    assert not same_bytes(first[2], plain[2])  # it began from another model
    assert all(same_bytes(one, other) for one, other in zip(last[:2], plain[:2], strict=True))
    assert not same_bytes(last[2], plain[2])


def rounds(*numbers: int) -> dict[str, Any]:
    return {"correction_rounds": numbers}


def test_a_run_that_goes_on_from_a_checkpoint_counts_the_true_rounds(tmp_path: Path) -> None:
    whole = run(**rounds(1, 3))
    run(2, checkpoint_dir=tmp_path, **rounds(1, 3))
    (last,) = run(3, checkpoint_dir=tmp_path, **rounds(1, 3))
    assert same_bytes(last, whole[2])


def test_the_choice_among_models_is_made_in_these_rounds_alone() -> None:
    chooses = strategy(select="calibration", correction=["repair"], correction_rounds=[1])
    states = [trained_copy(SENT, seed) for seed in (1, 2)]
    for number in (1, 2):
        _, metrics = play_round(chooses, SENT, states, server_round=number)
        assert metrics is not None
        assert ("rebasin-selected" in metrics) == (number == 1)


def test_clients_are_asked_in_these_rounds_alone() -> None:
    grid = Spy({place + 1: client(place) for place in range(3)})
    asks = FedRebasin(
        **GIVEN, correction="federated-regmean", correction_rounds=[2], reference="global", fraction_evaluate=0.0
    )
    result = asks.start(grid, state_to_record(GIVEN_SENT), num_rounds=3)
    assert [metrics.get("rebasin-query-rounds") for metrics in result.train_metrics_clientapp.values()] == [
        None,
        1,
        None,
    ]
    assert len(grid.queries) == 1


def test_the_last_round_is_the_one_that_the_run_ends_with(tmp_path: Path) -> None:
    plain = run(correction=None)
    last = strategy(correction_rounds="last")
    for length in (2, 3):  # the same strategy again, and another number of rounds
        models = run(length, last)
        assert all(same_bytes(*pair) for pair in zip(models[:-1], plain, strict=False))
        assert len(models) == length and same_bytes(models[-1], run(length, **rounds(length))[-1])
    assert last.correction_rounds == "last"
    run(2, checkpoint_dir=tmp_path, **rounds(3))
    (resumed,) = run(3, checkpoint_dir=tmp_path, correction_rounds="last")
    assert same_bytes(resumed, models[-1])


def test_a_round_outside_of_a_run_is_never_the_last() -> None:
    states = [trained_copy(SENT, seed) for seed in (1, 2)]
    found, _ = play_round(strategy(correction_rounds="last"), SENT, states)
    wanted, _ = play_round(strategy(correction=None), SENT, states)
    assert found is not None and wanted is not None and same_bytes(found, wanted)


def test_the_older_interface_refuses_the_last_round_which_it_does_not_know() -> None:
    with pytest.raises(RebasinError, match="correction_rounds='last' needs the message API"):
        legacy.Rebasin(legacy_flower.FedAvg(), model=small_net(), example_inputs=INPUTS, correction_rounds="last")


@pytest.mark.parametrize(
    ("options", "length", "told"),
    [
        ({}, 2, True),
        ({}, 1, False),
        ({"correction_rounds": "last"}, 2, False),
        ({"correction_rounds": [1, 2]}, 2, False),
    ],
)
def test_what_can_ruin_a_network_that_trains_on_is_told(
    options: dict[str, Any], length: int, told: bool, warnings: list[str]
) -> None:
    grid = MemoryGrid({place + 1: client(place) for place in range(3)})
    asks = FedRebasin(**GIVEN, correction="federated-regmean", reference="global", fraction_evaluate=0.0, **options)
    asks.start(grid, state_to_record(GIVEN_SENT), num_rounds=length)
    assert told == any("follows each of 2 rounds, and clients train on" in line for line in warnings)


@pytest.mark.parametrize("wrong", [1, [], [0], [1.5], "12", "first", [[1]], [None]])
def test_what_names_no_rounds_is_refused(wrong: object) -> None:
    with pytest.raises(
        RebasinError, match=r"correction_rounds: expected a collection of round numbers from 1, as \[1\]"
    ):
        strategy(correction_rounds=wrong)


def test_rounds_without_a_correction_are_refused() -> None:
    with pytest.raises(
        RebasinError, match=r"correction_rounds=\[1\]: nothing is corrected; give correction= or select="
    ):
        strategy(correction=None, correction_rounds=[1])


def test_a_round_after_the_last_one_is_told(warnings: list[str]) -> None:
    run(2, **rounds(1, 7))
    assert [line for line in warnings if line.startswith("rebasin")] == [
        "rebasin: correction_rounds: [7]: the run ends after round 2"
    ]


def test_the_command_line_takes_them_behind_a_correction() -> None:
    name = "fedrebasin+repair@1+3"
    assert parse_strategies(name) == [name]
    assert label_of("rebasin:fedadam+repair@2") == "Rebasin(FedAdam) + repair in round 2"
    made = make_strategy(
        name,
        nodes=2,
        model=small_net,
        example_inputs=INPUTS,
        calibration=[torch.randn(100, 5)],
        reference="auto",
        matching="weight",
        correction="none",
        server_lr=0.01,
        proximal_mu=0.01,
        seed=0,
        device="cpu",
    )
    assert isinstance(made, FedRebasin)
    assert (made.correction, made.correction_rounds) == ("repair", [1, 3])


@pytest.mark.parametrize("wrong", ["fedrebasin@1", "fedrebasin+repair@", "fedrebasin+repair@0", "fedrebasin+none@1"])
def test_the_command_line_refuses_rounds_that_follow_nothing(wrong: str) -> None:
    with pytest.raises(RebasinError, match=r"--strategies: .*\+CORRECTION@ROUNDS \(as @1\+5\), .*got '" + wrong[:10]):
        parse_strategies(wrong)


def test_the_command_line_refuses_rounds_after_the_last() -> None:
    with pytest.raises(
        RebasinError, match=r"--strategies: expected rounds up to the last, 3; got 'fedrebasin.repair@1.4'"
    ):
        resolve(Settings(strategies="fedavg,fedrebasin+repair@1+4"))
