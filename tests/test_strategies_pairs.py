"""Complex parameters under inner strategies, which see them as pairs of real numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import MemoryGrid, State, answer, play_round, trained_copy, warnings
from flwr.app import Array, ArrayRecord
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import SimpleClientManager
from flwr.server import strategy as legacy
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, Strategy
from networks_spectral import FourierOperator
from test_complex import INPUTS, spec_of, weights
from test_strategies_legacy import Client

from fedrebasin import permute, random_perms
from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.legacy import Rebasin as LegacyRebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

SENT = weights(0)
INNER: dict[str, Callable[[], Strategy]] = {
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.25),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    "FedAdam": lambda: FedAdam(eta=0.01),
    "Krum": lambda: flower.Krum(num_malicious_nodes=1),
    "Bulyan": flower.Bulyan,
    "DP": lambda: flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 0.2, 4),
}


def copies(sent: State) -> list[State]:
    found = []
    for seed in range(4):
        real, imaginary = trained_copy(sent, seed), trained_copy(sent, 10 + seed)
        found.append(
            {
                key: real[key] + 1j * (imaginary[key] - value) if value.is_complex() else real[key]
                for key, value in sent.items()
            }
        )
    return found


def in_pairs(state: State) -> State:
    return {name: torch.view_as_real(value) if value.is_complex() else value for name, value in state.items()}


def equal(found: ArrayRecord | None, expected: ArrayRecord | None) -> bool:
    assert found is not None and expected is not None
    wanted = record_to_state(expected)
    return all(torch.equal(value, wanted[name].to(value)) for name, value in in_pairs(record_to_state(found)).items())


@pytest.mark.parametrize("inner", INNER)
def test_the_inner_strategy_treats_real_and_imaginary_parts_as_it_treats_real_weights(inner: str) -> None:
    states = copies(SENT)
    shuffled = [permute(spec_of(), random_perms(spec_of(), seed), state) for seed, state in enumerate(states)]
    np.random.seed(0)  # Flower's privacy noise comes from the global generator
    expected, _ = play_round(INNER[inner](), in_pairs(SENT), [in_pairs(state) for state in states])
    for replies in (states, shuffled):
        np.random.seed(0)
        found, _ = play_round(Rebasin(INNER[inner](), spec=spec_of(), reference="global"), SENT, replies)
        assert equal(found, expected)
        assert found is not None and found["spectral.0.weight"].dtype == "complex64"


def test_after_a_round_apart_the_inner_strategy_steps_from_the_complex_weights() -> None:
    strategy = Rebasin(INNER["FedAvgM"](), spec=spec_of(), reference="largest")
    model, _ = play_round(strategy, SENT, [weights(seed) for seed in (1, 2)])
    assert model is not None
    state = record_to_state(model)
    found, _ = play_round(strategy, state, copies(state), server_round=2)
    expected, _ = play_round(INNER["FedAvgM"](), in_pairs(state), [in_pairs(one) for one in copies(state)])
    assert equal(found, expected)


@pytest.mark.parametrize("inner", ["FedAdam", "FedAvgM"])
def test_a_resumed_run_takes_up_the_moments_of_complex_weights(inner: str, tmp_path: Path) -> None:
    def run(rounds: int, folder: Path | None) -> ArrayRecord:
        strategy = Rebasin(INNER[inner](), spec=spec_of(), reference="global", checkpoint_dir=folder)
        states = dict(enumerate(copies(SENT), 1))
        grid = MemoryGrid(dict.fromkeys(states, lambda message: answer(message, states[message.metadata.dst_node_id])))
        return strategy.start(grid, state_to_record(SENT), num_rounds=rounds).arrays

    run(1, tmp_path)
    assert equal(run(2, tmp_path), state_to_record(in_pairs(record_to_state(run(2, None)))))


def test_a_complex_aggregate_of_another_shape_is_not_handed_back(warnings: list[str]) -> None:
    class Flat(FedAvg):
        def aggregate_train(self, *given: Any) -> Any:
            arrays, metrics = super().aggregate_train(*given)
            assert arrays is not None
            arrays["spectral.0.weight"] = Array(arrays["spectral.0.weight"].numpy()[..., :1])
            return arrays, metrics

    found, _ = play_round(Rebasin(Flat(), spec=spec_of(), reference="global"), SENT, copies(SENT))
    assert found is None
    assert "has 'spectral.0.weight' as" in warnings[0] and warnings[0].endswith("the model stays")


def test_the_older_interface_does_the_same() -> None:
    def encode(state: State) -> Parameters:
        return ndarrays_to_parameters([value.numpy() for value in state.values()])

    def adam(state: State) -> legacy.FedAdam:
        return legacy.FedAdam(initial_parameters=encode(state), eta=0.01)

    def results(states: list[State]) -> list[tuple[ClientProxy, FitRes]]:
        return [
            (client, FitRes(Status(Code.OK, ""), encode(one), 10, {}))
            for (client, _), one in zip(sent, states, strict=True)
        ]

    strategy = LegacyRebasin(adam(SENT), model=FourierOperator, example_inputs=INPUTS, reference="global")
    manager = SimpleClientManager()
    manager.register(Client("0", dict, 10))
    manager.register(Client("1", dict, 10))
    sent = strategy.configure_fit(1, encode(SENT), manager)
    told = parameters_to_ndarrays(sent[0][1].parameters)
    assert all(np.array_equal(value, own.numpy()) for value, own in zip(told, SENT.values(), strict=True))
    states = copies(SENT)[:2]
    found, _ = strategy.aggregate_fit(1, results(states), [])
    expected, _ = adam(in_pairs(SENT)).aggregate_fit(1, results([in_pairs(state) for state in states]), [])
    assert found is not None and expected is not None
    merged = {name: torch.from_numpy(value) for name, value in zip(SENT, parameters_to_ndarrays(found), strict=True)}
    for value, wanted in zip(in_pairs(merged).values(), parameters_to_ndarrays(expected), strict=True):
        assert torch.equal(value, torch.from_numpy(wanted).to(value))
