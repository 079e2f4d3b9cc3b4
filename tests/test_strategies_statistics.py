"""Running statistics of the replies: what would spoil the average for all is left out, what data may do is not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from flower_messages import State, answer, configure, small_net, trained_copy, warnings
from flwr.serverapp.strategy import FedAvg
from test_strategies_exact import rebasin
from torch import Tensor

__all__ = ["warnings"]

SENT: State = small_net().state_dict()
MEAN, VAR = "1.running_mean", "1.running_var"
Change = Callable[[Tensor], Tensor]


def left_out(changes: list[tuple[str, Change] | None], sent: State = SENT) -> int:
    """How many replies a round leaves out of which some have another statistic."""
    strategy = rebasin(FedAvg())
    replies = []
    for place, message in enumerate(configure(strategy, sent, len(changes))):
        state, change = trained_copy(sent, place), changes[place]
        if change is not None:
            state[change[0]] = change[1](state[change[0]])
        replies.append(answer(message, state))
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    return int(metrics["rebasin-left-out"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (VAR, lambda t: t * 1e4, r"over 1000 times what the sent model and the other replies have \(1"),
        (VAR, lambda t: t * 1e15, "over 1000 times"),
        (VAR, lambda t: t * 0 - 100, "'1.running_var' with the value -100, a negative variance; left out"),
        (MEAN, lambda t: t + 1e3, r"root mean square 1e\+03, over 31.62 times .*: its inputs are not scaled as theirs"),
    ],
)
def test_one_reply_of_three_whose_statistics_would_spoil_the_average_is_left_out(
    name: str, change: Change, line: str, warnings: list[str]
) -> None:
    assert left_out([None, (name, change), None]) == 1
    assert len(warnings) == 1
    assert re.search(line, warnings[0]), warnings[0]


@pytest.mark.parametrize(
    "changes",
    [
        [(VAR, lambda t: t * 1e10)] * 3,
        [(VAR, lambda t: t * 1e10)] * 2 + [None] * 2,
        [(VAR, lambda t: t * 1e-10)] * 3 + [None],
        [(VAR, lambda t: t * 100), None, None],
        [(VAR, lambda t: t * 0), None, None],
        [(MEAN, lambda t: t + 20), None, None],
        [None, (VAR, lambda t: t * 1e10)],
    ],
    ids=["raw inputs", "half are raw", "the initial variance", "ten times the scale", "dead", "not centred", "of two"],
)
def test_statistics_that_data_may_have_are_no_fault(changes: list[tuple[str, Change] | None]) -> None:
    assert left_out(changes) == 0


def test_variances_that_were_negative_in_the_sent_model_may_stay_so() -> None:
    """As a server optimizer that took them for weights has left them; training makes them positive again."""
    sent = {**SENT, VAR: SENT[VAR] * 0 - 0.5}
    assert left_out([(VAR, lambda t: t * 0 - 0.1)] * 3, sent) == 0
