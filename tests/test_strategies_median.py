"""Around FedMedian and FedTrimmedAvg, which ask no reply for its number of examples, no claim of one decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flower_messages import State, play_round
from flwr.common import FitRes, parameters_to_ndarrays
from flwr.server import strategy as legacy
from flwr.server.client_manager import SimpleClientManager
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Strategy
from test_strategies_legacy import OK, Client, to_parameters
from trained_replies import fresh, nearest, strategy_around, trained

from fedrebasin import match_many, permute, trace
from fedrebasin.strategies.legacy import Rebasin as LegacyRebasin
from fedrebasin.strategies.records import record_to_state

INPUTS = (torch.randn(4, 5),)
HONEST, CLAIM = 10, 10**9


def attack() -> State:
    torch.manual_seed(0)
    return {name: 5 * torch.randn_like(values) for name, values in fresh().state_dict().items()}


@pytest.mark.parametrize("reference", ["auto", "merge-many", "medoid"])
def test_a_round_apart_is_the_median_of_the_aligned_replies(reference: str) -> None:
    replies = trained("apart")
    arrays, metrics = play_round(
        strategy_around(FedMedian(), reference=reference), fresh().state_dict(), replies, examples=[10, 30, 20]
    )
    spec, method = trace(fresh(), INPUTS), "merge-many" if reference == "auto" else reference
    perms = match_many(spec, replies, method=method, coefficients=[1 / 3] * 3).perms
    aligned = [permute(spec, own, state) for own, state in zip(perms, replies, strict=True)]
    median = {name: torch.stack([state[name] for state in aligned]).median(dim=0).values for name in aligned[0]}
    assert arrays is not None and metrics is not None
    assert float(metrics["rebasin-moved-fraction"]) > 0.5  # type: ignore[arg-type]
    assert nearest(record_to_state(arrays), median) < 1e-6


@pytest.mark.parametrize("kind", ["common", "apart"])
@pytest.mark.parametrize("inner", [FedMedian, lambda: FedTrimmedAvg(beta=0.3)], ids=["median", "trimmed"])
def test_a_claimed_number_of_examples_decides_nothing(inner: Callable[[], Strategy], kind: str) -> None:
    sent, replies = fresh().state_dict(), [*trained(kind), *trained(kind), attack()]
    found = []
    for claim in (HONEST, CLAIM):
        arrays, _ = play_round(strategy_around(inner()), sent, replies, examples=[HONEST] * 6 + [claim])
        assert arrays is not None
        found.append(record_to_state(arrays))
    assert all(torch.equal(found[0][name], found[1][name]) for name in sent)
    assert nearest(found[1], replies[-1]) > 1  # and the attacker's model is far from what comes out


@pytest.mark.parametrize("kind", ["common", "apart"])
@pytest.mark.parametrize("inner", [legacy.FedMedian, lambda: legacy.FedTrimmedAvg(beta=0.3)], ids=["median", "trimmed"])
def test_nor_does_it_on_the_older_interface(inner: Callable[[], legacy.Strategy], kind: str) -> None:
    sent, replies = fresh().state_dict(), [*trained(kind), *trained(kind), attack()]
    found = []
    for claim in (HONEST, CLAIM):
        strategy = LegacyRebasin(inner(), model=fresh(), example_inputs=INPUTS)
        clients = [Client(str(place), dict, 0) for place in range(len(replies))]
        manager = SimpleClientManager()
        for client in clients:
            manager.register(client)
        strategy.configure_fit(1, to_parameters(sent), manager)
        counts = [HONEST] * 6 + [claim]
        results = [FitRes(OK, to_parameters(state), count, {}) for state, count in zip(replies, counts, strict=True)]
        parameters, _ = strategy.aggregate_fit(1, list(zip(clients, results, strict=True)), [])
        assert parameters is not None
        found.append(parameters_to_ndarrays(parameters))
    assert all((one == other).all() for one, other in zip(*found, strict=True))
