"""Nodes with narrower networks in Flower: their replies take part, and each gets back its own width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flower_messages import MemoryGrid, answer, configure, play_round, trained_copy, warnings
from flwr.app import Array, Message, MetricRecord, RecordDict
from widths_cases import X, mlp, output, planted, spec_of, widened

from fedrebasin import RebasinError, permute, random_perms
from fedrebasin.errors import UsageError
from fedrebasin.strategies import FedRebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]


def test_a_narrow_node_and_wide_ones_of_one_function_merge_to_it_and_each_gets_its_own_width() -> None:
    specs, (wide, narrow) = planted("dead units")
    nets = [mlp(5, 7), mlp(3, 4)]
    states = [{name: tensor.float() for name, tensor in state.items()} for state in (wide, narrow)]
    moved = [permute(specs[place], random_perms(specs[place], 3 + place), state) for place, state in enumerate(states)]
    strategy = FedRebasin(model=nets[0], node_models=[nets[1]], example_inputs=X, reference="largest")
    sent = nets[0].state_dict()
    arrays, metrics = play_round(strategy, sent, [states[0], moved[1], moved[0]])
    assert arrays is not None and metrics is not None
    assert metrics["rebasin-left-out"] == 0
    x = torch.randn(20, 5, dtype=torch.float64)
    expected = output(narrow, x)
    merged = {name: tensor.double() for name, tensor in record_to_state(arrays).items()}
    torch.testing.assert_close(output(merged, x), expected, rtol=1e-4, atol=1e-5)
    messages = configure(strategy, record_to_state(arrays), 3, 2)
    shapes = [tuple(message.content.array_records["arrays"]["0.weight"].shape) for message in messages]
    assert shapes == [(5, 5), (3, 5), (5, 5)]


def test_a_narrow_node_gets_the_function_of_a_network_with_doubled_units_back() -> None:
    narrow = {name: tensor.double() for name, tensor in mlp(3, 4).state_dict().items()}
    wide = widened(narrow, {"0": [2, 0, 1, 0, 2, 1], "2": [3, 1, 0, 2, 2, 3, 0, 1]}, {"0": [0.5] * 6, "2": [0.5] * 8})
    strategy = FedRebasin(model=mlp(6, 8), node_models=[lambda: mlp(3, 4)], example_inputs=X)
    small = {name: tensor.float() for name, tensor in narrow.items()}
    play_round(strategy, mlp(6, 8, seed=1).state_dict(), [small, small])
    message = configure(strategy, {name: tensor.float() for name, tensor in wide.items()}, 2, 2)[1]
    back = {name: tensor.double() for name, tensor in record_to_state(message.content.array_records["arrays"]).items()}
    x = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(output(back, x), output(narrow, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resumed", [False, True])
def test_narrow_nodes_alone_get_their_function_back_until_a_node_has_trained_the_wide_model(resumed: bool) -> None:
    narrow, spec = mlp(3, 4, seed=1).state_dict(), spec_of(mlp(3, 4))
    wide, x = mlp(6, 8).state_dict(), torch.randn(20, 5)

    def back(states: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """What the last node gets after a round in which the nodes answer so."""
        strategy, other = (FedRebasin(model=mlp(6, 8), node_models=[mlp(3, 4)], example_inputs=X) for _ in range(2))
        arrays, _ = play_round(strategy, wide, states)
        assert arrays is not None
        if resumed:
            other._widths.load_state_dict(strategy._widths.state_dict())
        strategy = other if resumed else strategy
        message = configure(strategy, record_to_state(arrays), len(states), 2)[-1]
        got = {key: value.double() for key, value in record_to_state(message.content.array_records["arrays"]).items()}
        return output(got, x.double()).float()

    copies = [permute(spec, random_perms(spec, seed), narrow) for seed in range(2)]
    expected = mlp(3, 4)
    expected.load_state_dict(narrow)
    torch.testing.assert_close(back(copies), expected(x))
    assert (back([wide, *copies]) - expected(x)).norm() > 0.01 * expected(x).norm()  # all units take part


def test_a_narrow_reply_with_a_nan_is_left_out_and_the_round_goes_on(warnings: list[str]) -> None:
    wide, narrow = mlp(5, 7).state_dict(), mlp(3, 4).state_dict()
    strategy = FedRebasin(model=mlp(5, 7), node_models=[mlp(3, 4)], example_inputs=X)
    arrays, metrics = play_round(strategy, wide, [wide, {**narrow, "0.bias": torch.full((3,), torch.nan)}])
    assert arrays is not None and metrics is not None
    assert metrics["rebasin-left-out"] == 1
    assert "a narrower reply cannot be made to fit: model: expected finite weights" in warnings[0]


def cut_off(array: Array) -> Array:
    return Array(array.dtype, array.shape, array.stype, array.data[:60])


def big_endian(array: Array) -> Array:
    return Array(array.numpy().astype(">f4"))


@pytest.mark.parametrize("place, garble", [(0, cut_off), (2, cut_off), (2, big_endian)])
def test_a_reply_that_cannot_be_decoded_is_left_out_in_either_width(
    place: int, garble: Callable[[Array], Array], warnings: list[str]
) -> None:
    wide, narrow = mlp(5, 7).state_dict(), mlp(3, 4).state_dict()
    strategy = FedRebasin(model=mlp(5, 7), node_models=[mlp(3, 4)], example_inputs=X)
    messages = configure(strategy, wide, 4)
    records = [state_to_record(state) for state in (wide, wide, narrow, narrow)]
    records[place]["0.weight"] = garble(records[place]["0.weight"])
    replies = [answer(message, record) for message, record in zip(messages, records, strict=True)]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None and metrics["rebasin-left-out"] == 1
    assert f"rebasin: node {place + 1} sent '0.weight'" in warnings[-1]


def test_the_reference_of_narrower_replies_is_the_one_with_most_of_what_the_inner_strategy_counts() -> None:
    wide = [mlp(5, 7, seed=seed).state_dict() for seed in range(3)]
    options = {"model": mlp(5, 7), "node_models": [mlp(3, 4)], "example_inputs": X}
    strategy = FedRebasin(**options, weighted_by_key="samples")
    messages = configure(strategy, wide[0], 3)
    replies = [
        answer(message, state, None, samples=samples, num_examples=10 - samples)
        for message, state, samples in zip(messages, wide, (1, 5, 2), strict=True)
    ]
    found = strategy._widths._reference(replies, "arrays", state_to_record(wide[0]))
    assert torch.equal(found["0.weight"], wide[1]["0.weight"])


def test_a_reply_may_call_its_only_record_as_it_likes() -> None:
    wide, narrow = mlp(5, 7).state_dict(), mlp(3, 4).state_dict()
    strategy = FedRebasin(model=mlp(5, 7), node_models=[mlp(3, 4)], example_inputs=X)
    replies = [
        Message(RecordDict({"model": state_to_record(state), "m": MetricRecord({"num-examples": 1})}), reply_to=message)
        for message, state in zip(configure(strategy, wide, 2), (wide, narrow), strict=True)
    ]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None and metrics["rebasin-left-out"] == 0


def test_a_node_gets_the_width_that_it_trained_last_and_only_the_latest_nodes_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide, narrow = mlp(5, 7).state_dict(), mlp(3, 4).state_dict()
    strategy = FedRebasin(model=mlp(5, 7), node_models=[mlp(3, 4)], example_inputs=X)

    def widths_after(states: list[dict[str, torch.Tensor]], server_round: int) -> list[int]:
        play_round(strategy, wide, states, server_round=server_round)
        messages = configure(strategy, wide, len(states), server_round + 1)
        return [message.content.array_records["arrays"]["0.weight"].shape[0] for message in messages]

    assert widths_after([narrow, narrow, wide], 1) == [3, 3, 5]
    assert widths_after([narrow, wide, wide], 2) == [3, 5, 5]
    monkeypatch.setattr("fedrebasin.strategies.widths.MOST", 1)
    assert widths_after([narrow, narrow, wide], 3) == [5, 3, 5]


def test_a_second_run_begins_with_the_wide_model_at_every_node() -> None:
    wide, narrow = mlp(5, 7).state_dict(), mlp(3, 4).state_dict()
    sent: list[int] = []

    def node(message: Message) -> Message:
        sent.append(message.content.array_records["arrays"]["0.weight"].shape[0])
        return answer(message, narrow)

    strategy = FedRebasin(model=mlp(5, 7), node_models=[mlp(3, 4)], example_inputs=X, fraction_evaluate=0.0)
    for _ in range(2):
        strategy.start(MemoryGrid({1: node, 2: node}), state_to_record(wide), num_rounds=2)
    assert sent == [5, 5, 3, 3] * 2


def test_a_resumed_run_still_knows_each_nodes_width(tmp_path: Path) -> None:
    def run(folder: Path, rounds: int) -> tuple[dict[str, bytes], list[list[tuple[int, ...]]]]:
        sent: list[list[tuple[int, ...]]] = [[], []]

        def node(place: int, widths: tuple[int, int]) -> Callable[[Message], Message]:
            def train(message: Message) -> Message:
                state = record_to_state(message.content["arrays"])
                sent[place].append(tuple(state["0.weight"].shape))
                own = mlp(*widths, seed=place).state_dict()
                if sent[place][-1] == tuple(own["0.weight"].shape):
                    own = state
                return answer(message, trained_copy(own, message.content["config"]["server-round"]), 10 + place)

            return train

        net = mlp(5, 7)
        strategy = FedRebasin(
            model=net, node_models=[mlp(3, 4)], example_inputs=X, checkpoint_dir=folder, fraction_evaluate=0.0
        )
        result = strategy.start(
            MemoryGrid({11: node(0, (5, 7)), 12: node(1, (3, 4))}), state_to_record(net.state_dict()), rounds
        )
        return {name: array.numpy().tobytes() for name, array in result.arrays.items()}, sent

    torch.manual_seed(0)
    whole, seen = run(tmp_path / "whole", 3)
    assert seen == [[(5, 5)] * 3, [(5, 5), (3, 5), (3, 5)]]
    torch.manual_seed(0)
    run(tmp_path / "parts", 1)
    resumed, seen = run(tmp_path / "parts", 3)
    assert seen == [[(5, 5)] * 2, [(3, 5)] * 2]
    assert resumed == whole


def test_what_does_not_go_with_narrower_nodes_is_refused() -> None:
    with pytest.raises(UsageError, match="node_models: not built yet together with send_perms"):
        FedRebasin(model=mlp(5, 7), node_models=[mlp(3, 4)], example_inputs=X, send_perms=True)
    with pytest.raises(RebasinError, match="narrow: expected at most 3 units"):
        FedRebasin(model=mlp(3, 4), node_models=[mlp(5, 7)], example_inputs=X)
