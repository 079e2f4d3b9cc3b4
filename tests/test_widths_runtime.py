"""Two widths in one federation, in Flower's real simulation runtime: each node gets back a model of its own."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import nn

from fedrebasin.simulations.models import build_model
from fedrebasin.strategies import FedRebasin


def net_of(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("mlp", (1, 8, 8), 10, width=width)


@pytest.mark.slow
def test_nodes_of_width_512_and_256_train_together_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    client, server = ClientApp(), ServerApp()
    results: list[dict[int, MetricRecord]] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch  # this function travels, its module does not
        from torch.nn.functional import cross_entropy

        from fedrebasin.simulations.data import load_dataset
        from fedrebasin.simulations.models import build_model

        node = int(str(context.node_config["partition-id"]))
        data = load_dataset("digits", None)
        torch.manual_seed(node + 1)
        net = build_model("mlp", (1, 8, 8), 10, width=(512, 256)[node])
        state = message.content.array_records["arrays"].to_torch_state_dict()
        received = all(state[name].shape == tensor.shape for name, tensor in net.state_dict().items())
        if received:
            net.load_state_dict(state)
        test = data.normalise(data.test_images)
        accuracy = float((net(test).argmax(1) == data.test_labels).float().mean())
        images, labels = data.normalise(data.train_images)[node::2], data.train_labels[node::2]
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(10):
            for rows in torch.randperm(len(labels)).split(32):
                optimizer.zero_grad()
                cross_entropy(net(images[rows]), labels[rows]).backward()
                optimizer.step()
        values = {"num-examples": len(labels), "node": node, "received": int(received), "accuracy": accuracy}
        content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(values)})
        return Message(content, reply_to=message)

    def by_node(records: list[RecordDict], key: str) -> MetricRecord:
        found = {}
        for record in records:
            metrics = record.metric_records["metrics"]
            found |= {f"{name}-{metrics['node']}": metrics[name] for name in ("received", "accuracy")}
        return MetricRecord(found)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedRebasin(
            model=net_of(512),
            node_models=[net_of(256)],
            example_inputs=(torch.zeros(2, 1, 8, 8),),
            fraction_evaluate=0.0,
            train_metrics_aggr_fn=by_node,
        )
        run = strategy.start(grid, ArrayRecord(net_of(512).state_dict()), num_rounds=3)
        results.append(run.train_metrics_clientapp)

    run_simulation(server, client, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1}})
    first, second, third = (results[0][number] for number in (1, 2, 3))
    print(first, second, third)
    assert (first["received-0"], first["received-1"]) == (1, 0)
    for metrics in (second, third):
        assert (metrics["received-0"], metrics["received-1"], metrics["rebasin-left-out"]) == (1, 1, 0)
        assert min(float(str(metrics[name])) for name in ("accuracy-0", "accuracy-1")) > 0.85
