"""Inner strategies of a user's own: further records of the replies, and no number of examples."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from flower_messages import answer, configure, small_net, warnings
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from test_strategies_exact import rebasin, same_bytes, spec_of
from test_strategies_replies import GOOD, SENT

from fedrebasin import merge
from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]


class Scaffold(FedAvg):
    """As one that reads two further records, and leaves Flower's average the two that it takes."""

    read: list[tuple[dict[str, Array], dict[str, object]]]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        self.read = []
        for one in replies:
            control, timing = one.content.array_records["control"], one.content.metric_records["timing"]
            self.read.append((dict(control), dict(timing)))
            del one.content["control"], one.content["timing"]
        return super().aggregate_train(server_round, replies)


def play(strategy: Rebasin, *, more: bool = True) -> ArrayRecord:
    replies = [answer(message, GOOD[place]) for place, message in enumerate(configure(strategy, SENT, 2))]
    replies[1].content["numbers"] = replies[1].content.pop("metrics")  # each node calls its own as it likes
    for place, reply in enumerate(replies if more else []):
        reply.content["control"] = state_to_record({"0.weight": torch.full((12, 5), float(place))})
        reply.content["timing"] = MetricRecord({"seconds": place})
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return arrays


def test_further_records_reach_a_strategy_that_reads_them_and_flowers_own_does_not_see_them(
    warnings: list[str],
) -> None:
    own = Scaffold()
    found, expected = play(rebasin(own)), play(rebasin(FedAvg()), more=False)
    assert [(int(control["0.weight"].numpy()[0, 0]), timing) for control, timing in own.read] == [
        (0, {"seconds": 0}),
        (1, {"seconds": 1}),
    ]
    assert len(warnings) == 1
    assert warnings[0].startswith("rebasin: Scaffold gets 'control' as the nodes sent it: its units do not move")
    for arrays in (found, play(rebasin(FedAvg()))):
        assert same_bytes(arrays, expected)
    assert len(warnings) == 1


class Uniform(Strategy):
    """A mean of the replies in which all weigh the same; it names no key."""

    def summary(self) -> None:
        """Nothing."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, node, "train") for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        models = [record_to_state(one.content.array_records["arrays"]) for one in replies]
        return state_to_record(merge(models)), MetricRecord()

    def configure_evaluate(self, *_: object) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, *_: object) -> MetricRecord | None:
        return None


@pytest.mark.parametrize("metrics", [{"loss": 0.5}, {}, None])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("attribute", [False, True])
def test_replies_weigh_the_same_where_neither_the_strategy_nor_they_name_examples(
    attribute: bool, apart: bool, metrics: dict[str, float] | None, warnings: list[str]
) -> None:
    models = [small_net(seed=90 + place).state_dict() for place in range(2)] if apart else GOOD[:2]
    found: list[ArrayRecord] = []
    for examples in (None, 10):
        inner = Uniform()
        if attribute:
            inner.weighted_by_key = None  # type: ignore[attr-defined]
        strategy = Rebasin(inner, spec=spec_of(True), reference="merge-many" if apart else "global")
        replies = []
        for message, model in zip(configure(strategy, SENT, 2), models, strict=True):
            replies.append(answer(message, model, examples, **metrics or {}))
            if metrics is None and examples is None:
                del replies[-1].content["metrics"]
        arrays, figures = strategy.aggregate_train(1, replies)
        assert arrays is not None and figures is not None
        assert figures["rebasin-left-out"] == 0
        found.append(arrays)
    assert same_bytes(*found)
    assert not warnings


def test_one_reply_without_examples_among_others_with_them_is_left_out(warnings: list[str]) -> None:
    strategy = rebasin(Uniform())
    first, second = configure(strategy, SENT, 2)
    _, figures = strategy.aggregate_train(1, [answer(first, GOOD[0]), answer(second, GOOD[1], None)])
    assert figures is not None and figures["rebasin-left-out"] == 1
    assert warnings == ["rebasin: node 2 sent no 'num-examples' in a MetricRecord; left out of round 1"]
