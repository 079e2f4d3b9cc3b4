"""The reference is a policy: apart or from the model that was sent, joint rounds, privacy and selection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flower_messages import State, play_round, small_net, trained_copy, warnings
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, QFedAvg, Strategy
from test_strategies_exact import same_bytes
from test_strategies_legacy import INPUTS, PAIRS, SENT, play, to_parameters
from trained_replies import accuracy, data, fresh, nearest, strategy_around, trained

from fedrebasin import PermutationSpec, match_many, merge, permute, random_perms, trace
from fedrebasin.matching.methods import JOINT_REFERENCES
from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.legacy import Rebasin as LegacyRebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]


def round_of(kind: str, inner: Strategy, **options: str) -> tuple[Rebasin, ArrayRecord, dict[str, float]]:
    strategy = strategy_around(inner, **options)
    sent = fresh().state_dict()
    arrays, metrics = play_round(strategy, sent, trained(kind), examples=[10, 30, 20])
    assert arrays is not None
    assert metrics is not None
    return strategy, arrays, {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}


def spec_of_width() -> PermutationSpec:
    return trace(fresh(), (torch.randn(4, 5),))


def alone(kind: str, inner: Strategy) -> State:
    arrays, _ = play_round(inner, fresh().state_dict(), trained(kind), examples=[10, 30, 20])
    assert arrays is not None
    return record_to_state(arrays)


def test_in_a_common_start_auto_gives_the_inner_strategys_result() -> None:
    _, arrays, metrics = round_of("common", FedAdam(eta=0.01))
    assert metrics["rebasin-moved-fraction"] == 0
    expected = alone("common", FedAdam(eta=0.01))
    found = record_to_state(arrays)
    assert all(torch.equal(found[name], expected[name].to(found[name].dtype)) for name in found)


def test_in_a_round_apart_auto_aligns_the_replies_to_each_other() -> None:
    _, arrays, metrics = round_of("apart", FedAvg())
    _, same, _ = round_of("apart", FedAvg(), reference="merge-many")
    assert same_bytes(arrays, same)
    assert metrics["rebasin-moved-fraction"] > 0.5
    assert metrics["rebasin-objective-gain"] > 0
    _, to_sent, _ = round_of("apart", FedAvg(), reference="global")
    assert not same_bytes(arrays, to_sent)
    assert accuracy(record_to_state(arrays)) > accuracy(merge(trained("apart"), coefficients=[1, 3, 2])) + 0.05


@pytest.mark.parametrize("reference", JOINT_REFERENCES)
def test_a_joint_reference_is_what_match_many_finds_for_the_replies(reference: str) -> None:
    _, arrays, metrics = round_of("apart", FedAvg(), reference=reference)
    shares = [1 / 6, 1 / 2, 1 / 3]
    found = match_many(spec_of_width(), trained("apart"), coefficients=shares, method=reference)
    aligned = [permute(spec_of_width(), own, state) for own, state in zip(found.perms, trained("apart"), strict=True)]
    assert nearest(record_to_state(arrays), merge(aligned, coefficients=shares)) < 1e-6
    assert metrics["rebasin-objective-gain"] == pytest.approx(found.objective - found.objective_before)


def test_straight_through_many_learns_from_labels_in_a_round() -> None:
    x, y = data()
    batches = list(zip(x.split(100), y.split(100), strict=True))
    options = {"reference": "straight-through-many", "calibration": batches, "correction": None}
    strategy = strategy_around(FedAvg(), loss=F.cross_entropy, **options)  # type: ignore[arg-type]
    arrays, _ = play_round(strategy, fresh().state_dict(), trained("apart"), examples=[10, 30, 20])
    assert arrays is not None
    shares = [1 / 6, 1 / 2, 1 / 3]
    found = match_many(
        *(spec_of_width(), trained("apart")),
        coefficients=shares,
        method="straight-through-many",
        net=fresh(),
        batches=batches,
        loss=F.cross_entropy,
    )
    aligned = [permute(spec_of_width(), own, state) for own, state in zip(found.perms, trained("apart"), strict=True)]
    assert nearest(record_to_state(arrays), merge(aligned, coefficients=shares)) < 1e-6
    assert found.measures["loss"] <= found.measures["loss-before"]


@pytest.mark.parametrize("reference", ["auto", "merge-many", "medoid", "largest"])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: FedAdam(eta=0.1),
        lambda: FedYogi(eta=0.1),
        lambda: FedAdagrad(eta=0.1),
        lambda: QFedAvg(client_learning_rate=0.1),
    ],
    ids=["FedAdam", "FedYogi", "FedAdagrad", "QFedAvg"],
)
def test_a_round_apart_is_a_weighted_average_outside_the_inner_strategy(
    inner: Callable[[], Strategy], reference: str
) -> None:
    _, arrays, metrics = round_of("apart", inner(), reference=reference)
    _, average, _ = round_of("apart", FedAvg(), reference=reference)
    assert same_bytes(arrays, average)
    assert metrics["train_loss"] == pytest.approx((0.5 * 10 + 1.5 * 30 + 2.5 * 20) / 60)


def test_the_largest_reply_keeps_its_order_when_it_is_the_reference() -> None:
    replies = trained("apart")
    strategy = strategy_around(FedAvg(), reference="largest")
    arrays, _ = play_round(strategy, fresh().state_dict(), replies, examples=[1, 1e9, 1])
    assert arrays is not None
    assert nearest(record_to_state(arrays), replies[1]) < 1e-6


@pytest.mark.parametrize("reference", ["largest", *JOINT_REFERENCES])
def test_replies_aligned_to_each_other_come_back_into_the_order_of_the_model_that_they_were_trained_from(
    reference: str,
) -> None:
    """Otherwise a server optimizer's moments would belong to other units."""
    sent = fresh().state_dict()
    strategy = strategy_around(FedAvg(), reference=reference)
    near = trained("common")
    odd = permute(strategy.spec, random_perms(strategy.spec, 2), near[2])  # the heaviest, but not most examples
    expected = merge(near, coefficients=[0.35, 0.25, 0.4])
    arrays, metrics = play_round(strategy, sent, [near[0], near[1], odd], examples=[35, 25, 40])
    assert arrays is not None
    assert metrics is not None
    assert nearest(record_to_state(arrays), expected) < 1e-6
    assert 0 < float(metrics["rebasin-moved-fraction"]) < 0.4  # type: ignore[arg-type]


def test_the_inner_strategy_starts_from_the_merged_model_in_the_next_round() -> None:
    """FedAvgM keeps a model of its own, and would step back to the random one."""
    inner = FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
    strategy, arrays, _ = round_of("apart", inner)
    merged = record_to_state(arrays)
    states = [trained_copy(merged, seed, noise=0.01) for seed in range(3)]
    found, _ = play_round(strategy, merged, states, server_round=2)
    fresh_start = FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
    expected, _ = play_round(fresh_start, merged, states, server_round=2)
    assert found is not None
    assert expected is not None
    assert same_bytes(found, expected)


def test_an_adaptive_server_optimizer_starts_from_the_merged_model_too() -> None:
    strategy, arrays, _ = round_of("apart", FedAdam(eta=0.01))
    merged = record_to_state(arrays)
    states = [trained_copy(merged, seed, noise=0.01) for seed in range(3)]
    found, _ = play_round(strategy, merged, states, server_round=2)
    expected, _ = play_round(FedAdam(eta=0.01), merged, states, server_round=2)
    assert found is not None
    assert expected is not None
    state = record_to_state(expected)
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in record_to_state(found).items())


@pytest.mark.parametrize(
    "inner", [FedAdam(eta=0.01), FedYogi(eta=0.01), FedAvgM(server_learning_rate=0.5, server_momentum=0.9)]
)
def test_moments_of_before_a_round_apart_do_not_move_the_merged_model(inner: Strategy) -> None:
    strategy = strategy_around(inner)
    model, _ = play_round(strategy, fresh().state_dict(), trained("common"))
    assert model is not None
    merged, _ = play_round(strategy, record_to_state(model), trained("apart"), server_round=2)
    assert merged is not None
    state = record_to_state(merged)
    found, _ = play_round(strategy, state, [dict(state)] * 3, server_round=3)
    assert found is not None
    for name, tensor in record_to_state(found).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)


def test_a_lone_reply_that_was_trained_apart_becomes_the_model() -> None:
    reply = trained("apart")[0]
    inner = FedAvg(min_train_nodes=1, min_available_nodes=1)
    arrays, metrics = play_round(strategy_around(inner), fresh().state_dict(), [reply])
    assert arrays is not None
    assert metrics is not None
    assert same_bytes(arrays, state_to_record(reply))


def test_replies_that_share_a_start_of_their_own_are_not_moved(warnings: list[str]) -> None:
    """A common pre-trained model that the server does not have: do no harm, and say what FedAdam starts from."""
    states = [trained_copy(trained("apart")[0], seed, noise=0.01) for seed in range(3)]
    sent = fresh().state_dict()
    arrays, metrics = play_round(strategy_around(FedAdam(eta=0.01)), sent, states)
    expected, _ = play_round(FedAdam(eta=0.01), sent, states)
    assert arrays is not None
    assert expected is not None
    assert metrics is not None
    assert metrics["rebasin-moved-fraction"] == 0
    state = record_to_state(expected)
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in record_to_state(arrays).items())
    [line] = warnings
    assert "FedAdam steps from that model" in line and "give it as initial_arrays" in line


@pytest.mark.parametrize("name, stepping", [("FedAvg", False), ("FedAdam", True)])
def test_of_the_older_strategies_too_those_that_step_are_named_and_fedavg_is_not(
    name: str, stepping: bool, warnings: list[str]
) -> None:
    states = [trained_copy(small_net(seed=9).state_dict(), seed, noise=0.01) for seed in range(3)]
    inner = PAIRS[name][0](to_parameters(SENT))
    play(LegacyRebasin(inner, model=small_net(), example_inputs=INPUTS), SENT, states)
    told = [line for line in warnings if "steps from that model" in line]
    assert [f": {name} steps" in line for line in told] == [True] * stepping
