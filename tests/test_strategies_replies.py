"""Bad replies are left out of the round, each with one log line, and never end the run."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flower_messages import State, answer, configure, fail, play_round, small_net, trained_copy, warnings
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy
from test_strategies_exact import rebasin, same_bytes
from torch import nn

from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

SENT: State = small_net().state_dict()
GOOD = [trained_copy(SENT, seed) for seed in (1, 2, 3)]
Bad = Callable[[Message], Message]


def with_value(name: str, value: float) -> State:
    state = {key: tensor.clone() for key, tensor in GOOD[2].items()}
    state[name].view(-1)[0] = value
    return state


def with_tensor(name: str, tensor: torch.Tensor) -> State:
    return {**GOOD[2], name: tensor}


def without(name: str) -> State:
    return {key: tensor for key, tensor in GOOD[2].items() if key != name}


def with_garbage(name: str) -> ArrayRecord:
    record = state_to_record(GOOD[2])
    record[name] = Array("float32", tuple(GOOD[2][name].shape), "numpy.ndarray", b"garbage")
    return record


def with_two_records(message: Message) -> Message:
    reply = answer(message, GOOD[2])
    reply.content["one"] = reply.content["two"] = reply.content.pop("arrays")
    return reply


def without_metrics(message: Message) -> Message:
    reply = answer(message, GOOD[2])
    del reply.content["metrics"]
    return reply


BAD: dict[str, tuple[Bad, str]] = {
    "missing key": (lambda m: answer(m, without("0.bias")), r"10 of 11 tensors, without '0.bias'"),
    "unknown key": (lambda m: answer(m, with_tensor("x", torch.ones(1))), "a tensor 'x' that the sent model lacks"),
    "shape": (
        lambda m: answer(m, with_tensor("0.bias", torch.ones(5))),
        r"'0.bias' as \(5,\), the sent model has \(12,",
    ),
    "scalar shape": (
        lambda m: answer(m, with_tensor("1.num_batches_tracked", torch.tensor([1]))),
        r"as \(1,\), the .* \(\)",
    ),
    "dtype": (
        lambda m: answer(m, with_tensor("0.bias", torch.ones(12).double())),
        "'0.bias' with dtype float64, the sent",
    ),
    "nan": (lambda m: answer(m, with_value("3.weight", torch.nan)), "'3.weight' with a NaN or an infinity"),
    "infinity": (lambda m: answer(m, with_value("1.running_var", torch.inf)), "'1.running_var' with a NaN or an inf"),
    "1e30": (
        lambda m: answer(m, with_value("3.bias", -1e30)),
        r"'3.bias' with the value 1e\+30, whose square overflows",
    ),
    "1e30 statistic": (lambda m: answer(m, with_value("1.running_mean", 1e30)), "'1.running_mean' with the value"),
    "all 1e6": (
        lambda m: answer(m, {k: t * 1e6 if t.is_floating_point() else t for k, t in GOOD[2].items()}),
        "'0.weight' with root mean square .* over 1000 times",
    ),
    "garbage": (lambda m: answer(m, with_garbage("5.bias")), "'5.bias' in a form that cannot be decoded"),
    "no examples": (lambda m: answer(m, GOOD[2], examples=0), "'num-examples' = 0; a positive number"),
    "negative examples": (lambda m: answer(m, GOOD[2], examples=-3), "'num-examples' = -3; a positive number"),
    "nan examples": (lambda m: answer(m, GOOD[2], examples=float("nan")), "'num-examples' = nan; a positive number"),
    "infinite examples": (lambda m: answer(m, GOOD[2], examples=float("inf")), "'num-examples' = inf; a positive"),
    "absurd examples": (lambda m: answer(m, GOOD[2], examples=1e300), r"'num-examples' = 1e\+300; a positive number"),
    "list of examples": (lambda m: answer(m, GOOD[2], examples=[1.0, 2.0]), r"'num-examples' = \[1.0, 2.0\]"),  # type: ignore[arg-type]
    "no weight": (lambda m: answer(m, GOOD[2], examples=None, loss=1.0), "no 'num-examples' in a MetricRecord"),
    "no metrics": (without_metrics, "no 'num-examples' in a MetricRecord"),
    "two records": (with_two_records, "2 ArrayRecords and none called 'arrays'"),
    "empty record": (lambda m: answer(m, ArrayRecord()), "0 of 11 tensors, without '0.weight'"),
}


def aggregate(
    strategy: Strategy, bad: Bad | None, server_round: int = 1
) -> tuple[ArrayRecord | None, dict[str, object]]:
    """A round of two good nodes, and a third that is bad."""
    messages = configure(strategy, SENT, 2 if bad is None else 3, server_round)
    replies = [answer(message, state) for message, state in zip(messages, GOOD[:2], strict=False)]
    if bad is not None:
        replies.insert(1, bad(messages[2]))
    arrays, metrics = strategy.aggregate_train(server_round, replies)
    return arrays, dict(metrics or {})


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
def test_a_bad_reply_is_left_out_of_the_round_with_one_line(
    kind: str, inner: Callable[[], Strategy], warnings: list[str]
) -> None:
    bad, message = BAD[kind]
    expected, _ = aggregate(rebasin(inner()), None)
    warnings.clear()
    found, metrics = aggregate(rebasin(inner()), bad)
    assert expected is not None
    assert found is not None
    assert same_bytes(expected, found)
    assert metrics["rebasin-left-out"] == 1
    [line] = warnings
    assert pytest.approx(1) == metrics["rebasin-left-out"]
    assert "node 3 sent" in line
    assert line.endswith("left out of round 1")
    assert re.search(message, line), line


def test_a_duplicate_reply_is_left_out_and_the_first_is_kept(warnings: list[str]) -> None:
    strategy = rebasin(FedAvg())
    expected, _ = aggregate(rebasin(FedAvg()), None)
    messages = configure(strategy, SENT, 2)
    replies = [answer(messages[0], GOOD[0]), answer(messages[1], GOOD[1]), answer(messages[0], GOOD[2])]
    found, metrics = strategy.aggregate_train(1, replies)
    assert expected is not None
    assert found is not None
    assert metrics is not None
    assert same_bytes(expected, found)
    assert metrics["rebasin-left-out"] == 1
    assert warnings == ["rebasin: node 1 replied twice; its first reply is kept; left out of round 1"]


def test_with_no_good_reply_the_round_gives_nothing() -> None:
    strategy = rebasin(FedAdam())
    messages = configure(strategy, SENT, 2)
    assert strategy.aggregate_train(1, [BAD["nan"][0](messages[0]), BAD["no examples"][0](messages[1])]) == (None, None)
    assert strategy.aggregate_train(1, [fail(message) for message in messages]) == (None, None)
    assert strategy.aggregate_train(1, []) == (None, None)


def test_a_failed_node_does_not_stop_the_round_and_its_true_node_is_named(warnings: list[str]) -> None:
    strategy = rebasin(FedAvg())
    messages = configure(strategy, SENT, 3)
    lost = fail(messages[2])
    lost.metadata.__dict__["_src_node_id"] = 1  # as in the error that Flower makes for a lost node
    arrays, metrics = strategy.aggregate_train(1, [lost, answer(messages[0], GOOD[0]), answer(messages[1], GOOD[1])])
    expected, _ = aggregate(rebasin(FedAvg()), None)
    assert arrays is not None
    assert expected is not None
    assert metrics is not None
    assert same_bytes(arrays, expected)
    assert metrics["rebasin-left-out"] == 0
    assert warnings == ["rebasin: the failure in round 1 is node 3's: node lost"]


def test_of_two_replies_a_huge_one_is_not_its_own_yardstick(warnings: list[str]) -> None:
    strategy = rebasin(FedAvg())
    messages = configure(strategy, SENT, 2)
    huge = {name: tensor * 1e5 if tensor.is_floating_point() else tensor for name, tensor in GOOD[1].items()}
    _, metrics = strategy.aggregate_train(1, [answer(messages[0], GOOD[0]), answer(messages[1], huge)])
    assert metrics is not None
    assert metrics["rebasin-left-out"] == 1
    assert "node 2 sent" in warnings[0]


def test_a_model_of_zeros_that_was_sent_does_not_make_trained_replies_huge() -> None:
    strategy = rebasin(FedAvg())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in SENT.items()}
    messages = configure(strategy, zeros, 2)
    _, metrics = strategy.aggregate_train(1, [answer(m, state) for m, state in zip(messages, GOOD[:2], strict=True)])
    assert metrics is not None
    assert metrics["rebasin-left-out"] == 0


def test_large_running_statistics_are_no_fault() -> None:
    strategy = rebasin(FedAvg())
    messages = configure(strategy, SENT, 2)
    raw = {**GOOD[1], "1.running_var": GOOD[1]["1.running_var"] * 1e10}
    _, metrics = strategy.aggregate_train(1, [answer(messages[0], GOOD[0]), answer(messages[1], raw)])
    assert metrics is not None
    assert metrics["rebasin-left-out"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * np.inf, "holds a NaN or an infinity"),
        (lambda x: x[None], r"has '0.bias' as \(1, 12\), not \(12,\)"),
    ],
)
def test_an_aggregate_that_is_not_finite_or_misshapen_is_not_handed_back(
    change: Callable[[np.ndarray], np.ndarray], said: str, warnings: list[str]
) -> None:
    class Overflows(FedAvg):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            arrays, metrics = super().aggregate_train(server_round, replies)
            arrays["0.bias"] = Array(change(arrays["0.bias"].numpy()))
            return arrays, metrics

    strategy = rebasin(Overflows())
    messages = configure(strategy, SENT, 2)
    arrays, _ = strategy.aggregate_train(1, [answer(message, GOOD[0]) for message in messages])
    assert arrays is None
    assert re.search(f"the aggregate of round 1 {said}; the model stays", warnings[-1])


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("select", [None, "calibration"])
def test_a_mask_that_comes_back_as_it_was_sent_may_be_infinite(
    hidden: float, select: str | None, warnings: list[str]
) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("mask", torch.full((3, 3), hidden).triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.last(self.first(x).relu()).unsqueeze(1) + self.mask).softmax(-1)

    sent = Masked().state_dict()
    batches = [torch.randn(100, 5) for _ in range(4)]
    strategy = Rebasin(
        FedAvg(), model=Masked, example_inputs=(batches[0],), calibration=batches, correction="repair", select=select
    )
    replies = [{**trained_copy(sent, seed), "mask": sent["mask"]} for seed in (1, 2)]
    arrays, metrics = play_round(strategy, sent, replies)
    assert arrays is not None and metrics is not None
    assert metrics["rebasin-left-out"] == 0
    assert torch.equal(record_to_state(arrays)["mask"], sent["mask"])
    assert not [line for line in warnings if "rebasin" in line]
    replies[1]["mask"] = sent["mask"].clone().fill_(torch.nan)
    _, metrics = play_round(strategy, sent, replies)
    assert metrics is not None and metrics["rebasin-left-out"] == 1
