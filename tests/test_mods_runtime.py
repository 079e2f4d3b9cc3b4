"""rebasin_mod in Flower's real simulation runtime, clients in processes of their own: SecAgg+, and clipping."""

from __future__ import annotations

import pytest
import torch
from flower_messages import small_net
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
from flwr.simulation import run_simulation
from test_strategies_exact import spec_of

from fedrebasin import align, merge
from fedrebasin.simulations.secure import Settings, broadcast, checked_spec, secure_rounds, trained
from fedrebasin.strategies import rebasin_mod

SETTINGS = Settings(width=32, epochs=3)


@pytest.mark.slow
def test_a_secure_round_gives_the_average_of_models_aligned_to_the_trained_one_that_was_broadcast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    spec = checked_spec(SETTINGS)
    (found,), seen = secure_rounds(SETTINGS, [(0, "trained")], [secaggplus_mod, rebasin_mod(spec=spec)])
    ends = [trained(SETTINGS, 0, node) for node in range(SETTINGS.nodes)]
    coefficients = [examples for _, examples in ends]
    sent = broadcast(SETTINGS, 0, "trained")
    expected = merge([align(spec, sent, state) for state, _ in ends], coefficients=coefficients)
    plain = merge([state for state, _ in ends], coefficients=coefficients)
    assert seen == 0
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-4
    assert max(float((found[name] - plain[name]).abs().max()) for name in plain) > 1e-2


@pytest.mark.slow
def test_behind_flowers_clipping_permuted_clients_give_what_unpermuted_ones_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One simulation, two runs: clients in the sent model's order, and each in an order of its own."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    spec, sent = spec_of(), small_net().state_dict()
    client, server = ClientApp(), ServerApp()
    results: list[dict[str, torch.Tensor]] = []

    @client.train(mods=[fixedclipping_mod, rebasin_mod(spec=spec)])
    def train(message: Message, context: Context) -> Message:
        from fedrebasin import permute, random_perms  # this function travels, its module does not

        node = int(str(context.node_config["partition-id"]))
        state = message.content.array_records["arrays"].to_torch_state_dict()
        generator = torch.Generator().manual_seed(node)
        for tensor in state.values():
            tensor += 100 if tensor.ndim == 0 else 0.05 * torch.randn(tensor.shape, generator=generator)
        if message.content.config_records["config"]["shuffle"]:
            state = permute(spec, random_perms(spec, node), state)
        metrics = MetricRecord({"num-examples": 10 * (node + 1)})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for shuffle in (False, True):
            average = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
            strategy = DifferentialPrivacyClientSideFixedClipping(average, 0.0, 0.2, 2)
            config = ConfigRecord({"shuffle": shuffle})
            run = strategy.start(grid, ArrayRecord(sent), num_rounds=1, train_config=config)
            results.append(dict(run.arrays.to_torch_state_dict()))

    run_simulation(server, client, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1}})
    plain, shuffled = results
    for name, tensor in plain.items():
        torch.testing.assert_close(shuffled[name], tensor)  # FedAvg adds in the order in which the replies come
    assert torch.equal(plain["1.num_batches_tracked"], sent["1.num_batches_tracked"].double())
    update = sum(float((plain[name] - sent[name]).square().sum()) for name in spec.parameters) ** 0.5
    assert 0.1 < update <= 0.2  # of two clipped updates, whose directions differ
