"""The replies' metrics: those that not all have, those that the inner strategy cannot do without, and their names."""

from __future__ import annotations

import pytest
from flower_messages import answer, configure, fail, small_net, warnings
from flwr.app import ConfigRecord
from flwr.common.logger import FLOWER_LOGGER
from flwr.serverapp.strategy import FedAvg, QFedAvg
from test_strategies_exact import rebasin
from test_strategies_replies import GOOD, SENT

__all__ = ["warnings"]


def test_metrics_that_only_some_replies_have_do_not_end_the_run(warnings: list[str]) -> None:
    strategy = rebasin(FedAvg())
    messages = configure(strategy, SENT, 2)
    replies = [
        answer(messages[0], GOOD[0], loss=1.0, curve=[1.0, 2.0]),
        answer(messages[1], GOOD[1], loss=2.0, curve=[1.0]),
    ]
    replies[1].content["metrics"]["own"] = 3
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["loss"] == 1.5
    assert "own" not in metrics
    assert warnings == ["rebasin: metrics that not all replies have are not aggregated: curve, own"]


def test_a_reply_without_the_metric_that_the_inner_strategy_needs_is_left_out(warnings: list[str]) -> None:
    strategy = rebasin(QFedAvg(client_learning_rate=0.1))
    messages = configure(strategy, SENT, 2)
    arrays, metrics = strategy.aggregate_train(
        1, [answer(messages[0], GOOD[0], train_loss=1.0), answer(messages[1], GOOD[1])]
    )
    assert arrays is not None
    assert metrics is not None
    assert metrics["rebasin-left-out"] == 1
    assert "node 2 sent no metric 'train_loss', which the inner strategy needs" in warnings[0]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0])
def test_a_training_loss_that_the_inner_strategy_cannot_use_is_left_out(loss: float, warnings: list[str]) -> None:
    strategy = rebasin(QFedAvg(client_learning_rate=0.1))
    messages = configure(strategy, SENT, 2)
    replies = [answer(messages[0], GOOD[0], train_loss=1.0), answer(messages[1], GOOD[1], train_loss=loss)]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None and metrics is not None and metrics["rebasin-left-out"] == 1
    assert f"node 2 sent 'train_loss' = {loss}; the inner strategy needs a finite number from 0" in warnings[0]


def test_a_config_called_as_another_replys_metrics_does_not_displace_this_ones() -> None:
    strategy = rebasin(FedAvg())
    messages = configure(strategy, SENT, 2)
    replies = [answer(message, GOOD[0]) for message in messages]
    replies[0].content["more"] = replies[0].content.pop("metrics")
    replies[1].content["more"] = ConfigRecord({"x": "y"})
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None and metrics is not None and metrics["rebasin-left-out"] == 0


@pytest.mark.parametrize("good", [0, 2])
def test_failures_are_told_where_the_inner_strategy_is_not_asked(good: int, caplog: pytest.LogCaptureFixture) -> None:
    strategy = rebasin(FedAvg())
    messages = configure(strategy, SENT, good + 2)
    replies = [answer(message, small_net(seed=60 + place).state_dict()) for place, message in enumerate(messages)]
    replies[good:] = [fail(message, "out of memory") for message in messages[good:]]
    FLOWER_LOGGER.addHandler(caplog.handler)
    strategy.aggregate_train(1, replies)
    FLOWER_LOGGER.removeHandler(caplog.handler)
    assert f"aggregate_train: Received {good} results and 2 failures" in caplog.messages
    assert f"\t> Received error in reply from node {good + 2}: out of memory" in caplog.messages
