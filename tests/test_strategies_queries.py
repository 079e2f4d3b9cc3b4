"""Federated corrections in a strategy: real messages to the real client handler, on a grid in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from federated_clients import GIVEN, INPUTS, SENT, Spy, client, data, expected, net, plain, play, same
from flower_messages import Node, fail, warnings
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvgM
from torch import Tensor

from fedrebasin.corrections.federated import FEDERATED, Case
from fedrebasin.corrections.federated import Node as Asked
from fedrebasin.corrections.federated import answer as compute
from fedrebasin.corrections.queries import Query, drive
from fedrebasin.strategies import FederatedOptions, FedRebasin, Rebasin
from fedrebasin.strategies.queries import write_refusal
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]


def ours(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("rebasin")]


@pytest.mark.parametrize(
    ("correction", "options", "rounds"),
    [
        ("federated-repair", {}, 2),
        ("federated-repair", {"sequential": False}, 1),
        ("federated-least-squares", {}, 3),
        ("federated-least-squares", {"ridge": 0.01, "label_prior": True}, 3),
        ("federated-regmean", {}, 1),
        ("federated-regmean", {"gram_limit": 300}, 1),
    ],
)
def test_messages_give_what_one_process_computes_from_all_data(
    correction: str, options: dict[str, Any], rounds: int
) -> None:
    found, metrics, grid = play(correction, federated=FederatedOptions(**options))
    same(found, expected(correction, **options))
    assert any(not torch.allclose(found[name], tensor) for name, tensor in plain()[0].items())
    assert metrics["rebasin-query-rounds"] == rounds == len(grid.queries)
    assert metrics["rebasin-query-bytes"] == grid.bytes > 0
    assert metrics["rebasin-query-left-out"] == 0
    assert grid.timeouts == {7.0}


def spoil(name: str, tensor: Callable[[Tensor], Tensor]) -> Callable[[Message, Message], Message]:
    """Change one array of an answer."""

    def change(message: Message, reply: Message) -> Message:
        sums = reply.content.array_records["sums"]
        if name in sums:
            sums[name] = state_to_record({name: tensor(record_to_state(sums)[name])})[name]
        return reply

    return change


def without_sums(message: Message, reply: Message) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"loss": 1.0})}), reply_to=message)


def undecodable(message: Message, reply: Message) -> Message:
    broken = ArrayRecord({name: Array("float64", (3,), "numpy.ndarray", b"no array") for name in ("fit.count", "x")})
    return Message(RecordDict({"sums": broken}), reply_to=message)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda message, reply: fail(message, "out of memory"),
            r"the error 'out of memory' \(is @app.query\('rebasin'\)",
        ),
        (spoil("fit.gram", lambda x: x * torch.nan), "'fit.gram' with a NaN, an infinity or"),
        (
            spoil("check.cross", lambda x: x[:-1]),
            r"'check.cross' as \(11, 5\) of torch.float64; \(12, 5\) of torch.float64",
        ),
        (spoil("fit.x", lambda x: x.float()), r"'fit.x' as \(5,\) of torch.float32; \(5,\) of torch.float64"),
        (spoil("fit.count", lambda x: 0 * x), "'fit' sums that no inputs have"),
        (without_sums, "no sums"),
        (undecodable, "sums that cannot be decoded"),
        (lambda message, reply: Message(write_refusal("I will not"), reply_to=message), "a refusal: 'I will not'"),
    ],
)
def test_one_bad_answer_leaves_its_node_out_and_costs_nothing_else(
    change: Callable[[Message, Message], Message], line: str, warnings: list[str]
) -> None:
    nodes = {1: client(0), 2: client(1, change), 3: client(2)}
    found, metrics, grid = play("federated-least-squares", nodes)
    same(found, expected("federated-least-squares", (0, 2)))
    assert metrics["rebasin-query-left-out"] == 1
    assert metrics["rebasin-left-out"] == 0
    assert grid.queries == [[1, 2, 3], [1, 3], [1, 3]]
    (found_line,) = ours(warnings)
    assert re.match(f"rebasin: node 2 answered a query with {line}", found_line), found_line
    assert found_line.endswith("left out of the correction of round 1")


@pytest.mark.parametrize("correction", FEDERATED)
def test_a_node_whose_activations_are_of_another_order_is_left_out(correction: str, warnings: list[str]) -> None:
    found, metrics, _ = play(correction, {1: client(0), 2: client(1, scale=1e5), 3: client(2)})
    same(found, expected(correction, (0, 2)))
    assert metrics["rebasin-query-left-out"] == 1
    (line,) = ours(warnings)
    assert re.match(
        r"rebasin: node 2 answered a query with activations of size \S+, where the other nodes have \d", line
    )


def test_an_error_is_its_senders_whatever_node_flower_names(warnings: list[str]) -> None:
    def lost(message: Message, reply: Message) -> Message:
        error = fail(message, "lost")
        error.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink writes for a node that is gone
        return error

    found, _, grid = play("federated-least-squares", {1: client(0), 2: client(1, lost), 3: client(2)})
    same(found, expected("federated-least-squares", (0, 2)))
    assert grid.queries == [[1, 2, 3], [1, 3], [1, 3]]
    (line,) = ours(warnings)
    assert line.startswith("rebasin: node 2 answered a query with the error 'lost'")


@pytest.mark.parametrize("correction", FEDERATED)
def test_a_node_that_is_late_is_left_out(correction: str, warnings: list[str]) -> None:
    found, metrics, _ = play(correction, lost=(3,))
    same(found, expected(correction, (0, 1)))
    assert metrics["rebasin-query-left-out"] == 1
    assert ours(warnings) == [
        "rebasin: node 3 answered a query with nothing within 7 s; left out of the correction of round 1"
    ]


def test_a_node_that_fails_later_is_left_out_of_both_sides_of_repairs_quotient() -> None:
    asked = [0]

    def second(message: Message, reply: Message) -> Message:
        asked[0] += 1
        return fail(message) if asked[0] == 2 else reply

    found, metrics, grid = play("federated-repair", {1: client(0), 2: client(1, second), 3: client(2)})
    assert metrics["rebasin-query-left-out"] == 1
    assert grid.queries == [[1, 2, 3], [1, 2, 3]]
    merged, ends, shares = plain()
    places = iter([(0, 1, 2), (0, 2)])

    def ask(query: Query) -> dict[int, Any]:
        asked = {place: Asked(net(), query.merged, ends[place], data(place)) for place in next(places)}
        return {place: query.read(compute(query.kind, query.about, one)) for place, one in asked.items()}

    same(found, drive(FEDERATED["federated-repair"](Case(net(), merged, ends, shares, INPUTS)), ask))


def test_where_no_client_has_the_handler_the_merged_model_stays(warnings: list[str]) -> None:
    def train_alone(seed: int) -> Node:
        full = client(seed)

        def node(message: Message) -> Message:
            if message.metadata.message_type == "train":
                return full(message)
            return fail(message, "No query function registered with name 'rebasin'")

        return node

    found, metrics, _ = play("federated-repair", {place + 1: train_alone(place) for place in range(3)})
    same(found, plain()[0], 0.0)
    assert metrics["rebasin-query-left-out"] == 3
    assert metrics["rebasin-query-rounds"] == 1
    assert ours(warnings)[0].startswith(
        "rebasin: node 1 answered a query with the error \"No query function registered with name 'rebasin'\" (is @app."
    )
    assert ours(warnings)[-1] == (
        "rebasin: federated-repair failed (RebasinError: no node gave an answer that can be used); this round is not "
        "corrected"
    )


def test_a_grid_that_breaks_does_not_end_the_run(warnings: list[str]) -> None:
    class Broken(Spy):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            sent = list(messages)
            if sent and sent[0].metadata.message_type != "train":
                raise ConnectionError("gone")
            return super().send_and_receive(sent, timeout=timeout)

    strategy = FedRebasin(**GIVEN, correction="federated-regmean", reference="global", fraction_evaluate=0.0)
    grid = Broken({place + 1: client(place) for place in range(3)})
    result = strategy.start(grid, state_to_record(SENT), num_rounds=1)
    same(record_to_state(result.arrays), plain()[0], 0.0)
    assert ours(warnings) == ["rebasin: federated-regmean failed (ConnectionError: gone); this round is not corrected"]


def test_queries_wait_as_long_as_other_rounds_with_checkpoints_too(tmp_path: Path) -> None:
    found, metrics, grid = play("federated-regmean", checkpoint_dir=tmp_path)
    same(found, expected("federated-regmean"))
    assert grid.timeouts == {7.0}
    assert metrics["rebasin-query-rounds"] == 1


def test_a_node_learns_what_it_was_told_in_training() -> None:
    seen: list[dict[str, Any]] = []

    def spy(message: Message, reply: Message) -> Message:
        seen.append(dict(message.content.config_records["config"]))
        return reply

    strategy = FedRebasin(**GIVEN, correction="federated-regmean", reference="global", fraction_evaluate=0.0)
    grid = Spy({1: client(0, spy), 2: client(1)})
    strategy.start(grid, state_to_record(SENT), num_rounds=2, train_config=ConfigRecord({"seed": 5}))
    assert seen == [{"seed": 5, "server-round": 1}, {"seed": 5, "server-round": 2}]


def test_an_outer_optimizer_goes_on_from_the_corrected_model() -> None:
    inner = FedAvgM(server_learning_rate=0.5, server_momentum=0.9, fraction_evaluate=0.0)
    strategy = Rebasin(
        inner, model=net, example_inputs=INPUTS, correction="federated-least-squares", reference="global"
    )
    found, _, _ = play(None, strategy=strategy)
    assert inner.current_arrays is not None
    kept = record_to_state(inner.current_arrays)
    assert list(kept) == [name for name in SENT if name in strategy.spec.parameters]
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
