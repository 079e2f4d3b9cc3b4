"""What travels beside the weights: records that move with them, and the perms that go back to the nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flower_messages import MemoryGrid, State, answer, configure, small_net, trained_copy, warnings
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAdam, FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from test_strategies_exact import same_bytes, spec_of

from fedrebasin import permute, random_perms
from fedrebasin.errors import SpecMismatchError, UsageError
from fedrebasin.strategies import FedRebasin, Rebasin, perms_from_record
from fedrebasin.strategies import beside as beside_module
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

SENT: State = small_net().state_dict()
EXAMPLES = [10.0, 30.0, 20.0]
SHARES = [1 / 6, 1 / 2, 1 / 3]


def control_of(seed: int) -> State:
    return {name: tensor for name, tensor in trained_copy(SENT, 50 + seed).items() if name in spec_of().parameters}


def strategy_with(**options: Any) -> Rebasin:
    return Rebasin(FedAdam(eta=0.01), spec=spec_of(), reference="global", **options)


def replies_to(messages: list[Message], seeds: list[int | None]) -> list[Message]:
    """Node i sends its model and its control variate in the order of seeds[i]; None is the sent model's order."""
    replies = []
    for place, (message, seed) in enumerate(zip(messages, seeds, strict=True)):
        state, control = trained_copy(SENT, place), control_of(place)
        if seed is not None:
            perms = random_perms(spec_of(), seed)
            control = {name: permute(spec_of(), perms, {**SENT, **control})[name] for name in control}
            state = permute(spec_of(), perms, state)
        reply = answer(message, state, EXAMPLES[place])
        reply.content["control"] = state_to_record(control)
        replies.append(reply)
    return replies


def play(strategy: Rebasin, seeds: list[int | None]) -> State:
    arrays, _ = strategy.aggregate_train(1, replies_to(configure(strategy, SENT, 3), seeds))
    assert arrays is not None
    return record_to_state(arrays)


def flowers_average(states: list[State], examples: list[int]) -> State:
    records = [
        RecordDict({"arrays": state_to_record(state), "metrics": MetricRecord({"num-examples": count})})
        for state, count in zip(states, examples, strict=True)
    ]
    return record_to_state(aggregate_arrayrecords(records, "num-examples"))


def test_a_record_beside_the_weights_is_permuted_with_them_and_averaged_by_the_same_shares() -> None:
    strategy = strategy_with(beside=["control"])
    assert strategy.beside == {}
    play(strategy, [7, 8, 9])
    expected = flowers_average([control_of(place) for place in range(3)], [1, 3, 2])
    found = record_to_state(strategy.beside["control"])
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_is_the_same_with_and_without_records_beside_it() -> None:
    with_it, without = play(strategy_with(beside=["control"]), [7, 8, 9]), play(strategy_with(), [7, 8, 9])
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_with_records_beside_them_the_weights_may_have_any_name() -> None:
    strategy = strategy_with(beside=["control"])
    replies = replies_to(configure(strategy, SENT, 3), [7, 8, 9])
    for reply in replies:
        reply.content["mine"] = reply.content.pop("arrays")
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert metrics["rebasin-left-out"] == 0


def test_the_averages_are_sent_with_the_next_model_and_may_be_replaced_before() -> None:
    strategy = strategy_with(beside=["control"])
    play(strategy, [7, 8, 9])
    for message in configure(strategy, SENT, 3, 2):
        assert list(message.content.array_records) == ["arrays", "control"]
        assert same_bytes(message.content.array_records["control"], strategy.beside["control"])
        assert same_bytes(message.content.array_records["arrays"], state_to_record(SENT))
    strategy.beside["control"] = state_to_record({"0.bias": torch.zeros(12)})
    assert list(configure(strategy, SENT, 3, 2)[0].content.array_records["control"]) == ["0.bias"]


def test_a_record_that_does_not_fit_is_left_out_of_its_average_and_the_weights_count(warnings: list[str]) -> None:
    strategy = strategy_with(beside=["control"])
    replies = replies_to(configure(strategy, SENT, 3), [7, 8, 9])
    broken = control_of(1)
    broken["0.bias"] = torch.full((12,), torch.nan)
    replies[1].content["control"] = state_to_record(broken)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert metrics["rebasin-left-out"] == 0
    (line,) = warnings
    assert line.startswith(
        "rebasin: node 2 sent as 'control' '0.bias' with a NaN, an infinity or complex numbers; left"
    )
    found = record_to_state(strategy.beside["control"])
    expected = flowers_average([control_of(0), control_of(2)], [1, 2])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    expected_model = play(strategy_with(), [7, 8, 9])
    assert all(torch.equal(tensor, expected_model[name]) for name, tensor in record_to_state(arrays).items())


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ({"bias": torch.zeros(12)}, "a tensor 'bias' that is none of the weights"),
        ({"0.bias": torch.zeros(3)}, "'0.bias' as (3,), the weight has (12,)"),
        ({}, "node 1 sent as 'control' nothing"),
        ({"0.bias": torch.zeros(12)}, "other tensors than most nodes"),
        ({name: tensor.double() for name, tensor in control_of(0).items()}, "other tensors than most nodes"),
        ({"0.bias": torch.zeros(12, dtype=torch.complex64)}, "'0.bias' with a NaN, an infinity or complex numbers"),
    ],
)
def test_each_misfit_is_named(control: State, reason: str, warnings: list[str]) -> None:
    strategy = strategy_with(beside=["control"])
    replies = replies_to(configure(strategy, SENT, 3), [None] * 3)
    replies[0].content["control"] = state_to_record(control)
    strategy.aggregate_train(1, replies)
    assert len(warnings) == 1
    assert reason in warnings[0]


def test_each_node_gets_the_perms_of_its_last_reply_once_and_only_if_it_took_part() -> None:
    strategy = FedRebasin(spec=spec_of(), send_perms=True, reference="global")
    messages = configure(strategy, SENT, 3)
    assert all(perms_from_record(spec_of(), message.content) is None for message in messages)
    replies = replies_to(messages, [7, 8, 9])
    replies[2].content["arrays"] = state_to_record({name: t + torch.nan for name, t in trained_copy(SENT, 2).items()})
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    second = configure(strategy, record_to_state(arrays), 3, 2)
    for place, (message, seed) in enumerate(zip(second[:2], [7, 8], strict=True)):
        perms = perms_from_record(spec_of(), message.content)
        assert perms is not None
        moved = permute(spec_of(), random_perms(spec_of(), seed), trained_copy(SENT, place))
        back = permute(spec_of(), perms, moved)
        assert all(torch.equal(back[name], tensor) for name, tensor in trained_copy(SENT, place).items())
    assert perms_from_record(spec_of(), second[2].content) is None
    assert "rebasin-perms" not in second[2].content
    third = configure(strategy, SENT, 3, 3)  # nobody answered in the second round: the old perms mean nothing now
    assert all(perms_from_record(spec_of(), message.content) is None for message in third)


def test_a_round_apart_ends_what_nodes_that_were_absent_would_have_got() -> None:
    strategy = FedRebasin(spec=spec_of(), send_perms=True, beside=("control",))
    first = replies_to(configure(strategy, SENT, 3), [7, 8, 9])
    strategy.aggregate_train(1, first)
    assert "control" in strategy.beside
    messages = configure(strategy, SENT, 5, 2)[3:]
    apart = [answer(m, trained_copy(small_net(seed=60 + m.metadata.dst_node_id).state_dict(), 0)) for m in messages]
    strategy._beside._perms = {1: state_to_record(random_perms(spec_of(), 7))}  # node 1 was not sampled
    arrays, metrics = strategy.aggregate_train(2, apart)
    assert arrays is not None and metrics is not None and metrics["rebasin-moved-fraction"]
    told = [perms_from_record(spec_of(), m.content) is not None for m in configure(strategy, SENT, 5, 3)]
    assert told == [False, False, False, True, True]
    assert "control" not in strategy.beside


def test_perms_of_another_model_are_refused() -> None:
    strategy = FedRebasin(spec=spec_of(), send_perms=True)
    strategy.aggregate_train(1, replies_to(configure(strategy, SENT, 3), [None] * 3))
    content = configure(strategy, SENT, 3, 2)[0].content
    with pytest.raises(SpecMismatchError, match=r"perms: expected exactly the spec's .* '0' is in one only"):
        perms_from_record(spec_of().fix("0"), content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beside": "control"}, r"beside: expected names of ArrayRecords, as \('control',\); got 'control'"),
        ({"beside": ["arrays"]}, "beside: 'arrays' is taken"),
        ({"beside": ["rebasin-perms"]}, "beside: 'rebasin-perms' is taken"),
    ],
)
def test_names_that_do_not_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FedRebasin(spec=spec_of(), **options)


@pytest.mark.parametrize(
    "inner", [flower.Krum, lambda: flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1, 2)]
)
def test_under_privacy_and_selection_nothing_is_averaged_beside_the_weights(inner: Any) -> None:
    with pytest.raises(UsageError, match=r"beside=\('control',\): under .* would go past clipping or selection"):
        Rebasin(inner(), spec=spec_of(), beside=["control"])


def test_permutations_wait_for_the_latest_nodes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_module, "MOST", 2)
    strategy = strategy_with(send_perms=True)
    play(strategy, [7, 8, 9])
    found = [perms_from_record(spec_of(), message.content) for message in configure(strategy, SENT, 3, 2)]
    assert [perms is None for perms in found] == [True, False, False]


def test_a_second_run_sends_nothing_of_the_first_but_what_was_put_there_by_hand() -> None:
    sent: list[list[set[str]]] = []

    def node(message: Message) -> Message:
        sent[-1].append(set(message.content.array_records))
        reply = answer(message, trained_copy(SENT, 1))
        reply.content["control"] = state_to_record(control_of(1))
        return reply

    strategy = FedRebasin(spec=spec_of(), beside=["control"], send_perms=True, fraction_evaluate=0.0)
    strategy.beside["hand"] = state_to_record({})
    for _ in range(2):
        sent.append([])
        strategy.start(MemoryGrid({1: node, 2: node}), state_to_record(SENT), num_rounds=2)
    assert sent[0] == sent[1] == [{"arrays", "hand"}] * 2 + [{"arrays", "hand", "control", "rebasin-perms"}] * 2
