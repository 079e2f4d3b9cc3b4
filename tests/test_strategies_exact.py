"""Rebasin around other strategies: exactness, buffers, key order, dtypes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from flower_messages import State, answer, configure, play_round, small_net, trained_copy
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Strategy
from torch import nn

from fedrebasin import PermutationSpec, check_spec, permute, random_perms, trace
from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

NODES = 4
Make = Callable[[], Strategy]
INNER: dict[str, Make] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    "FedAvgM off": FedAvgM,
    "FedAdam": lambda: FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99),
    "FedAdagrad": lambda: flower.FedAdagrad(eta=0.01),
    "FedYogi": lambda: flower.FedYogi(eta=0.01, beta_1=0.9, beta_2=0.99),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1),
    "FedMedian": flower.FedMedian,
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.25),
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1, q=0.2),
    "Krum": flower.Krum,
    "MultiKrum": lambda: flower.MultiKrum(num_nodes_to_select=2),
    "Bulyan": flower.Bulyan,
    "DP fixed": lambda: flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 0.2, NODES),
    "DP adaptive": lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, NODES),
    "DP around FedAdam": lambda: flower.DifferentialPrivacyServerSideFixedClipping(FedAdam(eta=0.01), 0.0, 0.2, NODES),
}
GUARDED = {"Krum", "MultiKrum", "Bulyan", "DP fixed", "DP adaptive", "DP around FedAdam"}


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """QFedAvg and Bulyan collect garbage for every reply, and torch's modules are a million objects to visit."""
    spec_of()  # imports the exporter
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def spec_of(norm: bool = True) -> PermutationSpec:
    net, inputs = small_net(norm=norm), (torch.randn(4, 5),)
    return check_spec(net, trace(net, inputs), inputs)


def rebasin(inner: Strategy, norm: bool = True) -> Rebasin:
    return Rebasin(inner, spec=spec_of(norm), reference="global")


def two_rounds(strategy: Strategy, shuffle: bool) -> list[ArrayRecord]:
    """Play two rounds; with ``shuffle``, every reply comes in an order of its own."""
    np.random.seed(0)  # Flower's privacy noise comes from the global generator
    sent: State = small_net().state_dict()
    results = []
    for server_round in (1, 2):
        states = [trained_copy(sent, seed=10 * server_round + node) for node in range(NODES)]
        if shuffle:
            states = [permute(spec_of(), random_perms(spec_of(), 100 + node), s) for node, s in enumerate(states)]
        arrays, _ = play_round(strategy, sent, states, server_round=server_round)
        assert arrays is not None
        results.append(arrays)
        sent = record_to_state(arrays)
    return results


def same_bytes(a: ArrayRecord, b: ArrayRecord) -> bool:
    return list(a) == list(b) and all(a[name].data == b[name].data for name in a)


@pytest.mark.parametrize("inner", INNER)
def test_replies_in_any_order_of_their_units_give_exactly_the_same(inner: str) -> None:
    plain, shuffled = (two_rounds(rebasin(INNER[inner]()), shuffle) for shuffle in (False, True))
    assert all(same_bytes(a, b) for a, b in zip(plain, shuffled, strict=True))


@pytest.mark.parametrize("inner", INNER)
def test_where_alignment_moves_nothing_the_floats_are_the_inner_strategys_bit_for_bit(inner: str) -> None:
    """The inner strategy alone, on the parameters alone, with its result cast to the sent dtypes."""
    aligned, alone = rebasin(INNER[inner]()), INNER[inner]()
    sent: State = small_net().state_dict()
    names = list(spec_of().parameters)
    for server_round in (1, 2):
        states = [trained_copy(sent, seed=10 * server_round + node) for node in range(NODES)]
        np.random.seed(server_round)
        arrays, metrics = play_round(aligned, sent, states, server_round=server_round)
        params = {name: sent[name] for name in names}
        np.random.seed(server_round)
        expected, _ = play_round(
            alone, params, [{name: s[name] for name in names} for s in states], server_round=server_round
        )
        assert arrays is not None
        assert expected is not None
        assert metrics is not None
        assert metrics["rebasin-moved-fraction"] == 0
        found, wanted = record_to_state(arrays), record_to_state(expected)
        for name in names:
            assert torch.equal(found[name], wanted[name].to(sent[name].dtype)), name
        sent = found


def test_where_alignment_moves_nothing_running_statistics_are_fedavgs_bit_for_bit() -> None:
    sent: State = small_net().state_dict()
    states = [trained_copy(sent, seed) for seed in range(NODES)]
    found, wanted = (play_round(one, sent, states)[0] for one in (rebasin(FedAvg()), FedAvg()))
    assert found is not None
    assert wanted is not None
    assert set(spec_of().buffers)
    assert NODES > 2  # the order of two summands has no bits
    for name, tensor in record_to_state(found).items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, record_to_state(wanted)[name]), name


@pytest.mark.parametrize("inner", INNER)
def test_keys_dtypes_and_shapes_of_the_result_are_the_sent_models(inner: str) -> None:
    sent: State = dict(reversed(small_net().state_dict().items()))
    arrays, _ = play_round(rebasin(INNER[inner]()), sent, [trained_copy(sent, seed) for seed in range(NODES)])
    assert arrays is not None
    assert list(arrays) == list(sent)
    for name, tensor in record_to_state(arrays).items():
        assert tensor.dtype == sent[name].dtype
        assert tensor.shape == sent[name].shape


def test_a_reply_in_another_key_order_counts_the_same() -> None:
    sent: State = small_net().state_dict()
    states = [trained_copy(sent, seed) for seed in range(2)]
    turned = [dict(reversed(state.items())) for state in states]
    inner = INNER["FedAvgM"]
    expected, _ = play_round(rebasin(inner()), sent, states)
    found, _ = play_round(rebasin(inner()), sent, turned)
    assert expected is not None
    assert found is not None
    assert same_bytes(expected, found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_models_of_other_precision_keep_it(dtype: torch.dtype) -> None:
    sent = {name: t.to(dtype) if t.is_floating_point() else t for name, t in small_net().state_dict().items()}
    states = [trained_copy(sent, seed) for seed in range(2)]
    shuffled = [permute(spec_of(), random_perms(spec_of(), seed), state) for seed, state in enumerate(states)]
    arrays, _ = play_round(rebasin(FedAdam(eta=0.01)), sent, shuffled)
    assert arrays is not None
    assert all(tensor.dtype == sent[name].dtype for name, tensor in record_to_state(arrays).items())


def test_running_statistics_are_the_weighted_average_of_the_aligned_replies() -> None:
    sent: State = small_net().state_dict()
    states = [trained_copy(sent, seed) for seed in (1, 2)]
    shuffled = [permute(spec_of(), random_perms(spec_of(), seed), state) for seed, state in enumerate(states)]
    arrays, _ = play_round(rebasin(FedAdam(eta=0.01)), sent, shuffled, examples=[30, 10])
    assert arrays is not None
    found = record_to_state(arrays)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[name], 0.75 * states[0][name] + 0.25 * states[1][name])
    assert found["1.running_var"].min() > 0


def test_counters_stay_integers_and_are_the_largest_of_the_replies() -> None:
    sent: State = small_net().state_dict()
    arrays, _ = play_round(rebasin(FedAvg()), sent, [trained_copy(sent, seed) for seed in (3, 7)])
    assert arrays is not None
    counter = record_to_state(arrays)["1.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter.shape == ()
    assert counter == 7


@pytest.mark.parametrize("inner", sorted(GUARDED))
def test_under_privacy_and_selection_no_reply_reaches_the_buffers(inner: str) -> None:
    sent: State = small_net().state_dict()
    arrays, _ = play_round(rebasin(INNER[inner]()), sent, [trained_copy(sent, seed) for seed in range(NODES)])
    assert arrays is not None
    found = record_to_state(arrays)
    assert all(torch.equal(found[name], sent[name]) for name in spec_of().buffers)


def test_the_nodes_get_the_buffers_and_the_inner_strategy_does_not() -> None:
    inner = FedAdam()
    sent: State = small_net().state_dict()
    messages = configure(rebasin(inner), sent, nodes=3)
    assert len(messages) == 3
    for message in messages:
        received = record_to_state(message.content.array_records["arrays"])
        assert list(received) == list(sent)
        assert all(torch.equal(received[name], sent[name]) for name in sent)
        assert message.content.config_records["config"]["server-round"] == 1
    assert inner.current_arrays is not None
    assert not set(inner.current_arrays) & set(spec_of().buffers)


def test_extra_records_of_a_reply_do_not_stop_the_inner_strategy() -> None:
    sent: State = small_net().state_dict()
    strategy = rebasin(FedAvg())
    replies = [answer(message, trained_copy(sent, seed=2)) for message in configure(strategy, sent, 2)]
    replies[0].content["grams"] = state_to_record({"gram": torch.eye(3)})
    replies[1].content["more"] = replies[1].content["metrics"]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert list(arrays) == list(sent)


def test_a_model_without_hidden_units_passes_through() -> None:
    net, inputs = nn.Linear(4, 3), (torch.randn(2, 4),)
    strategy = Rebasin(FedAvg(), model=net, example_inputs=inputs)
    sent = net.state_dict()
    arrays, metrics = play_round(strategy, sent, [trained_copy(sent, seed) for seed in range(2)])
    assert arrays is not None
    assert metrics is not None
    assert metrics["rebasin-moved-fraction"] == 0
