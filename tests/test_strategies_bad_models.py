"""A sent model of NaN; what single clients send stands in test_strategies_faults.py."""

from __future__ import annotations

import pytest
import torch
from flower_messages import play_round
from flwr.serverapp.strategy import FedAvg
from trained_replies import fresh, strategy_around, trained

from fedrebasin.strategies.records import record_to_state


@pytest.mark.parametrize("reference", ["auto", "global", "largest"])
def test_a_sent_model_of_nan_does_not_end_the_run(reference: str) -> None:
    sent = {name: torch.full_like(tensor, torch.nan) for name, tensor in fresh().state_dict().items()}
    arrays, metrics = play_round(strategy_around(FedAvg(), reference=reference), sent, trained("apart"))
    assert arrays is not None
    assert metrics is not None
    assert (metrics["rebasin-moved-fraction"] == 0) == (reference == "global")
    assert all(torch.isfinite(tensor).all() for tensor in record_to_state(arrays).values())
