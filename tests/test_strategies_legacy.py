"""The older strategies: the same models as through the message API, and Flower's legacy server itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import play_round, small_net, trained_copy, warnings  # noqa: F401
from flwr.common import (
    Code,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersRes,
    GetPropertiesRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import Server, ServerConfig, SimpleClientManager
from flwr.server import strategy as legacy
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import strategy as current
from torch import Tensor

from fedrebasin import permute, random_perms, trace
from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.legacy import Rebasin as LegacyRebasin
from fedrebasin.strategies.legacy_arrays import Letter
from fedrebasin.strategies.records import record_to_state

State = dict[str, Tensor]
INPUTS = (torch.randn(4, 5),)
OK = Status(Code.OK, "")


def to_parameters(state: State) -> Parameters:
    return ndarrays_to_parameters([value.numpy() for value in state.values()])


def to_state(parameters: Parameters) -> State:
    arrays = parameters_to_ndarrays(parameters)
    return {
        name: torch.from_numpy(np.array(array)) for name, array in zip(small_net().state_dict(), arrays, strict=True)
    }


class Client(ClientProxy):
    """A client in this process that returns a given model, or what ``train`` makes of what it gets."""

    def __init__(self, cid: str, train: Callable[[State], State], examples: int) -> None:
        super().__init__(cid)
        self.train, self.examples = train, examples

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        trained = self.train(to_state(ins.parameters))
        return FitRes(OK, to_parameters(trained), self.examples, {"loss": 0.5, "kind": "small"})

    def evaluate(self, ins: Any, timeout: float | None, group_id: int | None) -> EvaluateRes:
        return EvaluateRes(OK, 1.0, self.examples, {})

    def get_parameters(self, ins: Any, timeout: float | None, group_id: int | None) -> GetParametersRes:
        raise NotImplementedError

    def get_properties(self, ins: Any, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        raise NotImplementedError

    def reconnect(self, ins: Any, timeout: float | None, group_id: int | None) -> Any:
        return None


def play(strategy: legacy.Strategy, sent: State, states: list[State], server_round: int = 1) -> tuple[State, Any]:
    manager = SimpleClientManager()
    for place, state in enumerate(states):
        manager.register(Client(str(place), lambda _, state=state: state, 10 * (place + 1)))
    instructions = strategy.configure_fit(server_round, to_parameters(sent), manager)
    assert all(to_state(ins.parameters).keys() == sent.keys() for _, ins in instructions)
    instructions.sort(key=lambda item: item[0].cid)
    parameters, metrics = strategy.aggregate_fit(
        server_round, [(client, client.fit(ins, None, None)) for client, ins in instructions], []
    )
    assert parameters is not None
    return to_state(parameters), metrics


def moved_copies(sent: State, seed: int = 0) -> list[State]:
    spec = trace(small_net(), INPUTS)
    perms = [random_perms(spec, seed=seed + place) for place in range(4)]
    return [permute(spec, perm, trained_copy(sent, seed + place)) for place, perm in enumerate(perms)]


SENT = small_net(seed=3).state_dict()
PAIRS: dict[str, tuple[Callable[[Parameters], legacy.Strategy], Callable[[], current.Strategy]]] = {
    "FedAvg": (lambda _: legacy.FedAvg(inplace=False), current.FedAvg),
    "FedProx": (lambda _: legacy.FedProx(proximal_mu=0.1), lambda: current.FedProx(proximal_mu=0.1)),
    "FedAvgM": (
        lambda initial: legacy.FedAvgM(initial_parameters=initial, server_momentum=0.9),
        lambda: current.FedAvgM(server_momentum=0.9),
    ),
    "FedAdam": (
        lambda initial: legacy.FedAdam(initial_parameters=initial, eta=0.01),
        lambda: current.FedAdam(eta=0.01),
    ),
    "FedYogi": (
        lambda initial: legacy.FedYogi(initial_parameters=initial, eta=0.01),
        lambda: current.FedYogi(eta=0.01),
    ),
    "FedAdagrad": (
        lambda initial: legacy.FedAdagrad(initial_parameters=initial, eta=0.01),
        lambda: current.FedAdagrad(eta=0.01),
    ),
    "FedMedian": (lambda _: legacy.FedMedian(), current.FedMedian),
    "FedTrimmedAvg": (lambda _: legacy.FedTrimmedAvg(beta=0.25), lambda: current.FedTrimmedAvg(beta=0.25)),
    "Krum": (lambda _: legacy.Krum(num_malicious_clients=1), lambda: current.Krum(num_malicious_nodes=1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_older_interface_gives_the_models_of_the_message_api(name: str) -> None:
    make_old, make_new = PAIRS[name]
    old = LegacyRebasin(make_old(to_parameters(SENT)), model=small_net, example_inputs=INPUTS)
    new = Rebasin(make_new(), model=small_net, example_inputs=INPUTS)
    old_model = new_model = SENT
    for server_round in (1, 2):
        replies = moved_copies(SENT, 10 * server_round)
        old_model, metrics = play(old, old_model, replies, server_round)
        arrays, _ = play_round(new, new_model, replies, [10.0, 20.0, 30.0, 40.0], server_round)
        assert arrays is not None
        new_model = record_to_state(arrays)
        assert metrics["rebasin-moved-fraction"] > 0.5 and metrics["rebasin-left-out"] == 0
        for key, value in new_model.items():
            assert old_model[key].dtype == SENT[key].dtype
            torch.testing.assert_close(old_model[key], value, rtol=1e-5, atol=1e-6)


def test_permuted_clients_give_what_unpermuted_ones_give_under_privacy_without_noise() -> None:
    def wrapped() -> legacy.Strategy:
        return legacy.DifferentialPrivacyServerSideFixedClipping(legacy.FedAvg(inplace=False), 0.0, 0.3, 4)

    plain, _ = play(
        LegacyRebasin(wrapped(), model=small_net, example_inputs=INPUTS),
        SENT,
        copies := [trained_copy(SENT, place) for place in range(4)],
    )
    spec = trace(small_net(), INPUTS)
    moved = [permute(spec, random_perms(spec, seed=place), state) for place, state in enumerate(copies)]
    found, _ = play(LegacyRebasin(wrapped(), model=small_net, example_inputs=INPUTS), SENT, moved)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_flowers_legacy_server_runs_rounds_with_it_and_a_broken_client_costs_none(warnings: list[str]) -> None:  # noqa: F811
    spec = trace(small_net(), INPUTS)
    manager = SimpleClientManager()
    for place in range(3):
        perm = random_perms(spec, seed=place)
        manager.register(
            Client(str(place), lambda sent, perm=perm, place=place: permute(spec, perm, trained_copy(sent, place)), 10)
        )
    manager.register(Client("broken", lambda sent: dict(list(sent.items())[:2]), 10))
    strategy = LegacyRebasin(
        legacy.FedAvg(
            initial_parameters=to_parameters(SENT),
            min_available_clients=4,
            fraction_evaluate=0.0,
            fit_metrics_aggregation_fn=lambda found: {
                "loss": sum(metrics["loss"] for _, metrics in found) / len(found)
            },
            evaluate_fn=lambda server_round, arrays, _: (float(len(arrays)), {}),
        ),
        model=small_net,
        example_inputs=INPUTS,
    )
    server = Server(client_manager=manager, strategy=strategy)
    history, _ = server.fit(num_rounds=2, timeout=None)
    assert [loss for _, loss in history.losses_centralized] == [len(SENT)] * 3
    assert [value for _, value in history.metrics_distributed_fit["rebasin-left-out"]] == [1, 1]
    assert [value for _, value in history.metrics_distributed_fit["loss"]] == [0.5, 0.5]
    assert sum("node broken sent 0 of 11 tensors" in line for line in warnings) == 2
    assert ServerConfig(num_rounds=2).num_rounds == 2


@pytest.mark.parametrize("make", [legacy.FedAvg, lambda: legacy.FedProx(proximal_mu=0.1)])
def test_clients_that_are_sent_one_model_share_its_bytes(make: Callable[[], legacy.Strategy]) -> None:
    manager = SimpleClientManager()
    for place in range(4):
        manager.register(Client(str(place), dict, 10))
    strategy = LegacyRebasin(make(), model=small_net, example_inputs=INPUTS)
    instructions = strategy.configure_fit(1, to_parameters(SENT), manager)
    assert len(instructions) == 4 and len({id(one.parameters) for _, one in instructions}) == 1


@pytest.mark.parametrize("kind", [int, np.int64, np.float32])
def test_a_truth_value_among_the_metrics_is_a_number_and_numpys_are_pythons(kind: Callable[[int], int]) -> None:
    result = FitRes(OK, to_parameters(SENT), kind(10), {"converged": True, "kind": "small"})
    letter = Letter.of(Client("1", dict, 10), result, list(SENT))
    assert dict(letter.content["metrics"]) == {"converged": 1, "num-examples": 10}


@pytest.mark.parametrize("inner", [partial(legacy.FedAdam, eta=0.01), partial(legacy.FedAvgM, server_momentum=0.9)])
def test_a_round_apart_under_a_server_optimizer_is_the_merge_of_the_clients(
    inner: Callable[..., legacy.Strategy],
) -> None:
    strategy = LegacyRebasin(
        inner(
            initial_parameters=to_parameters(SENT),
            fit_metrics_aggregation_fn=lambda found: {"clients": len(found), "kinds": len(found[0][1])},
        ),
        model=small_net,
        example_inputs=INPUTS,
    )
    states = moved_copies(small_net(seed=50).state_dict())
    found, metrics = play(strategy, SENT, states)
    reference = small_net(seed=50).state_dict()["0.weight"]
    rows = torch.cdist(found["0.weight"], reference).amin(1)
    assert float(rows.max()) < 0.2 < float(torch.cdist(SENT["0.weight"], reference).amin(1).max())
    assert metrics["clients"] == 4 and metrics["kinds"] == 2  # a string among them
    again, _ = play(strategy, found, [trained_copy(found, place, noise=0.02) for place in range(4)], 2)
    assert float((again["0.weight"] - found["0.weight"]).abs().max()) < 0.05


@pytest.mark.parametrize("seed", [3, 50], ids=["near", "apart"])
def test_failures_that_are_not_accepted_leave_the_model(seed: int) -> None:
    strategy = LegacyRebasin(legacy.FedAvg(accept_failures=False), model=small_net, example_inputs=INPUTS)
    manager = SimpleClientManager()
    for place, state in enumerate(moved_copies(small_net(seed=seed).state_dict())):
        manager.register(Client(str(place), lambda _, state=state: state, 10))
    sent = strategy.configure_fit(1, to_parameters(SENT), manager)
    results = [(client, client.fit(ins, None, None)) for client, ins in sent]
    assert strategy.aggregate_fit(1, results, [RuntimeError("lost")])[0] is None
    assert strategy.aggregate_fit(1, results, [])[0] is not None


@pytest.mark.parametrize("counts", [[0, 10], [0, 0], [-10, 10]])
def test_an_evaluation_on_no_examples_is_left_out_with_one_line(counts: list[int], warnings: list[str]) -> None:  # noqa: F811
    strategy = LegacyRebasin(legacy.FedAvg(), model=small_net, example_inputs=INPUTS)
    results = [(Client(str(place), dict, count), EvaluateRes(OK, 2.0, count, {})) for place, count in enumerate(counts)]
    loss, _ = strategy.aggregate_evaluate(2, results, [])  # type: ignore[arg-type]
    assert loss == (2.0 if 10 in counts else None)
    expected = f"client 0 sent 'num_examples' = {counts[0]}; a positive number is expected; left out of the evaluation"
    assert expected in warnings[0]
    assert len(warnings) == sum(count <= 0 for count in counts)
