"""Bad evaluation replies are left out, each with one log line, and never end the run."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from flower_messages import MemoryGrid, fail, small_net, warnings
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from test_strategies_exact import rebasin

from fedrebasin.strategies.records import state_to_record

__all__ = ["warnings"]

BAD: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "no weight": ({"metrics": {"acc": 0.0}}, "no 'num-examples' in its MetricRecord"),
    "renamed": (
        {"metrics": {"num-examples": 10, "accuracy": 0.0}},
        "other metrics than most nodes, 'metrics' with acc",
    ),
    "missing": ({"metrics": {"num-examples": 10}}, "other metrics than most nodes, 'metrics' with acc, num-examples"),
    "extra": ({"metrics": {"num-examples": 10, "acc": 0.0, "f1": 0.0}}, "other metrics than most nodes"),
    "another record": ({"m": {"num-examples": 10, "acc": 0.0}}, "other metrics than most nodes"),
    "list": ({"metrics": {"num-examples": 10, "acc": [0.0, 0.0]}}, "other metrics than most nodes"),
    "empty": ({}, "0 MetricRecords; one is expected"),
    "two records": ({"metrics": {"num-examples": 10, "acc": 0.0}, "m": {}}, "2 MetricRecords; one is expected"),
    "negative": ({"metrics": {"num-examples": -30, "acc": 0.0}}, "'num-examples' = -30; a positive number is expected"),
    "no examples": ({"metrics": {"num-examples": 0, "acc": 0.0}}, "'num-examples' = 0; a positive number is expected"),
    "list of examples": ({"metrics": {"num-examples": [1, 2], "acc": 0.0}}, r"'num-examples' = [1, 2]; a positive"),
}
GOOD = [{"metrics": {"num-examples": 10, "acc": 0.5}}, {"metrics": {"num-examples": 20, "acc": 0.8}}]


def evaluate(strategy: Any, contents: list[dict[str, dict[str, Any]] | None]) -> dict[str, Any] | None:
    """An evaluation in which node i answers with ``contents[i]``, or fails."""
    grid = MemoryGrid({node: lambda message: message for node in range(1, len(contents) + 1)})
    arrays = state_to_record(small_net().state_dict())
    messages: list[Message] = sorted(
        strategy.configure_evaluate(1, arrays, ConfigRecord(), grid), key=lambda message: message.metadata.dst_node_id
    )
    replies = []
    for message, content in zip(messages, contents, strict=True):
        message.metadata.__dict__["_message_id"] = str(uuid4())
        records = RecordDict({name: MetricRecord(metrics) for name, metrics in (content or {}).items()})
        replies.append(fail(message) if content is None else Message(records, reply_to=message))
    found = strategy.aggregate_evaluate(1, replies)
    return None if found is None else dict(found)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_evaluation_is_left_out_with_one_line(kind: str, warnings: list[str]) -> None:
    bad, reason = BAD[kind]
    strategy = rebasin(FedAvg())
    expected = evaluate(FedAvg(), [*GOOD, None])
    warnings.clear()
    assert evaluate(strategy, [bad, *GOOD]) == expected
    [line] = warnings
    assert line.startswith(f"rebasin: node 1 sent {reason}")
    assert line.endswith("left out of the evaluation of round 1")


def test_with_no_good_evaluation_there_are_no_metrics() -> None:
    assert evaluate(rebasin(FedAvg()), [BAD["no examples"][0]] * 3) is None


def test_good_evaluations_and_failures_reach_the_inner_strategy_as_they_are(warnings: list[str]) -> None:
    seen: list[Message] = []

    class Inner(FedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Any) -> None:
            seen.extend(replies)

    evaluate(rebasin(Inner()), [GOOD[0], None, GOOD[1]])
    assert [message.has_error() for message in seen] == [False, True, False]
    assert [dict(message.content["metrics"]) for message in seen[::2]] == [one["metrics"] for one in GOOD]
    assert warnings == []


@pytest.mark.parametrize("private", [False, True])
def test_a_strategy_that_averages_in_its_own_way_gets_what_most_nodes_send(private: bool, warnings: list[str]) -> None:
    seen: list[Message] = []

    class Inner(FedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Any) -> None:
            seen.extend(replies)

    usual = {"metrics": {"acc": 0.5}, "timing": {"seconds": 1.0}}
    inner = DifferentialPrivacyServerSideFixedClipping(Inner(), 0.1, 0.2, 3) if private else Inner()
    strategy = rebasin(inner)
    warnings.clear()  # what privacy says of statistics
    evaluate(strategy, [usual, {"metrics": {"acc": 0.5}}, usual])
    assert [len(message.content.metric_records) for message in seen] == [2, 2]
    assert len(warnings) == 1 and "'metrics' with acc; 'timing' with seconds" in warnings[0]
