"""A strategy whose matching uses data: the model, the calibration batches and the loss reach the method."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flower_messages import play_round, small_net, trained_copy, warnings
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum
from torch import Tensor, nn
from trained_replies import WIDTH, accuracy, data, fresh, nearest, trained

from fedrebasin import merge, permute, random_perms
from fedrebasin.matching.methods import METHODS, MatchingSetting, find_matching
from fedrebasin.simulations.competitors import make_strategy
from fedrebasin.strategies import FedRebasin, Rebasin
from fedrebasin.strategies.records import record_to_state

__all__ = ["warnings"]

BATCHES = [(data()[0][:300], data()[1][:300]), (data()[0][300:], data()[1][300:])]


def strategy_with(matching: str, inner: Any = FedAvg, **options: Any) -> Rebasin:
    if METHODS[matching].targets:
        options["loss"] = F.cross_entropy
    model = partial(small_net, WIDTH, norm=False)
    return Rebasin(
        inner(),
        **{
            "model": model,
            "example_inputs": (torch.randn(4, 5),),
            "calibration": BATCHES,
            "matching": matching,
            "correction": None,
            **options,
        },
    )


def setting_of(strategy: Rebasin, matching: str) -> MatchingSetting:
    loss = F.cross_entropy if METHODS[matching].targets else None
    return MatchingSetting(strategy.spec, small_net(WIDTH, norm=False), BATCHES, loss=loss)


@pytest.mark.parametrize("matching", [name for name in METHODS if name != "weight"])
@pytest.mark.parametrize("reference", ["auto", "largest"])
def test_in_a_round_apart_replies_are_matched_to_the_largest(matching: str, reference: str) -> None:
    strategy = strategy_with(matching, reference=reference)
    replies = trained("apart")
    arrays, metrics = play_round(strategy, fresh().state_dict(), replies, examples=[10, 30, 20])
    assert arrays is not None
    assert metrics is not None
    setting = setting_of(strategy, matching)
    found = [find_matching(matching, setting, replies[1], reply).perms for reply in (replies[0], replies[2])]
    aligned = [permute(strategy.spec, found[0], replies[0]), replies[1], permute(strategy.spec, found[1], replies[2])]
    state = record_to_state(arrays)
    assert nearest(state, merge(aligned, coefficients=[1, 3, 2])) < 1e-6
    assert accuracy(state) > accuracy(merge(replies, coefficients=[1, 3, 2])) + 0.05
    assert metrics["rebasin-moved-fraction"] > 0.3  # type: ignore[operator]


@pytest.mark.parametrize("matching", ["activation", "activation+weight"])
@pytest.mark.parametrize("inner", [FedAdam, partial(Krum, num_malicious_nodes=0)])
def test_shuffled_replies_come_back_into_the_order_of_the_sent_model(matching: str, inner: Any) -> None:
    strategy = strategy_with(matching, inner, reference="global")
    sent = trained("apart")[0]
    near = [trained_copy(sent, seed, noise=0.001) for seed in range(3)]
    shuffled = [permute(strategy.spec, random_perms(strategy.spec, seed), state) for seed, state in enumerate(near)]
    arrays, _ = play_round(strategy, sent, shuffled)
    expected, _ = play_round(strategy_with(matching, inner, reference="global"), sent, near)
    assert arrays is not None
    assert expected is not None
    assert nearest(record_to_state(arrays), record_to_state(expected)) < 1e-6


class Broken(nn.Module):
    """Runs as often as construction needs, and then raises what no one expects."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_net(WIDTH, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 7 and not torch.compiler.is_exporting():
            raise KeyError("seven")
        return self.inner(x)


def test_a_model_that_raises_in_a_round_moves_nothing_and_the_run_goes_on(warnings: list[str]) -> None:
    batches = [BATCHES[0][0], BATCHES[1][0], torch.zeros(7, 5)]
    strategy = strategy_with("activation", model=Broken, calibration=batches, reference="global")
    replies = [{f"inner.{name}": tensor for name, tensor in state.items()} for state in trained("apart")]
    arrays, metrics = play_round(strategy, replies[0], replies)
    assert arrays is not None
    assert metrics is not None
    assert metrics["rebasin-moved-fraction"] == 0
    assert warnings == ["rebasin: alignment failed (KeyError: 'seven'); the replies stay as they are"]


def test_the_default_correction_still_comes_with_calibration_data() -> None:
    net = small_net()
    plain = [batch for batch, _ in BATCHES]
    strategy = FedRebasin(model=net, example_inputs=(plain[0],), calibration=plain, matching="activation")
    assert strategy.correction == "repair" and strategy.matching == "activation"


@pytest.mark.parametrize("matching", METHODS)
def test_the_command_lines_strategies_get_data_only_if_they_use_it(matching: str) -> None:
    strategy: Any = make_strategy(
        "fedrebasin",
        nodes=2,
        model=small_net,
        example_inputs=(torch.randn(4, 5),),
        calibration=BATCHES,
        reference="auto",
        matching=matching,
        correction="none",
        server_lr=0.1,
        proximal_mu=0.1,
        seed=0,
        device="cpu",
    )
    assert strategy.matching == matching and strategy.correction is None
    assert (strategy.calibration is BATCHES) == METHODS[matching].inputs


@pytest.mark.parametrize("surrounding", [lambda: torch.device("meta"), torch.inference_mode])
@pytest.mark.parametrize("matching", METHODS)
def test_neither_the_default_device_nor_inference_mode_changes_two_rounds(matching: str, surrounding: Any) -> None:
    model, example = small_net(WIDTH, norm=False), torch.randn(4, 5)

    def two_rounds() -> list[dict[str, Tensor]]:
        strategy = strategy_with(matching, model=model, example_inputs=(example,), correction="least-squares")
        found = [
            play_round(strategy, fresh_state, replies, server_round=place) for place, replies in enumerate(came, 1)
        ]
        return [record_to_state(arrays) for arrays, _ in found if arrays is not None]

    fresh_state, came = fresh().state_dict(), [trained("apart"), trained("near")]
    expected = two_rounds()
    with surrounding():
        found = two_rounds()
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
