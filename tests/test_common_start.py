"""Which replies count as trained from the model that was sent."""

from __future__ import annotations

import pytest
import torch
from flower_messages import small_net
from flwr.serverapp.strategy import FedAvg
from test_strategies_exact import spec_of
from trained_replies import fresh, strategy_around, trained

from fedrebasin import permute, random_perms
from fedrebasin.strategies.common_start import measure_nearness


@pytest.mark.parametrize("seed", [*range(3), 2**63 - 1])
def test_replies_trained_from_the_sent_model_are_near_and_others_are_not(seed: int) -> None:
    spec = strategy_around(FedAvg()).spec
    sent = fresh().state_dict()
    for near, apart in zip(trained("common"), trained("apart"), strict=True):
        assert measure_nearness(spec, sent, [near], seed=seed)[0].near
        assert not measure_nearness(spec, sent, [apart], seed=seed)[0].near
        shuffled = permute(spec, random_perms(spec, 50 + seed), near)
        assert not measure_nearness(spec, sent, [shuffled], seed=seed)[0].near


def test_a_sent_model_of_zeros_is_near_to_nothing() -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in small_net().state_dict().items()}
    assert not measure_nearness(spec_of(), zeros, [small_net(seed=1).state_dict()])[0].near
