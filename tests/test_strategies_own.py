"""Inner strategies of a user's own: they get further records of the replies."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flower_messages import answer, configure, warnings
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from test_strategies_exact import rebasin, same_bytes
from test_strategies_replies import GOOD, SENT

from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import state_to_record

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
