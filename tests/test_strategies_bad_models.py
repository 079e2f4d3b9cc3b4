"""One huge client, and a sent model of NaN."""

from __future__ import annotations

import pytest
import torch
from flower_messages import play_round
from flwr.serverapp.strategy import FedAvg
from trained_replies import accuracy, fresh, strategy_around, trained

from fedrebasin.strategies.records import record_to_state


def test_with_one_huge_client_the_accuracy_is_that_of_the_round_without_it() -> None:
    sent = fresh().state_dict()
    good = trained("apart")
    huge = {name: torch.full_like(tensor, 1e30) for name, tensor in sent.items()}
    with_it, metrics = play_round(strategy_around(FedAvg()), sent, [*good, huge], examples=[10, 10, 10, 1000])
    without, _ = play_round(strategy_around(FedAvg()), sent, good, examples=[10, 10, 10])
    assert with_it is not None
    assert without is not None
    assert metrics is not None
    assert metrics["rebasin-left-out"] == 1
    assert abs(accuracy(record_to_state(with_it)) - accuracy(record_to_state(without))) < 0.01


@pytest.mark.parametrize("reference", ["auto", "global", "largest"])
def test_a_sent_model_of_nan_does_not_end_the_run(reference: str) -> None:
    sent = {name: torch.full_like(tensor, torch.nan) for name, tensor in fresh().state_dict().items()}
    arrays, metrics = play_round(strategy_around(FedAvg(), reference=reference), sent, trained("apart"))
    assert arrays is not None
    assert metrics is not None
    assert (metrics["rebasin-moved-fraction"] == 0) == (reference == "global")
    assert all(torch.isfinite(tensor).all() for tensor in record_to_state(arrays).values())
