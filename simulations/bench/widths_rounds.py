"""Two widths in one federation: ``python -m fedrebasin.simulations.bench.widths_rounds --output FILE``.

Two nodes hold digits, 20% and 80% of each half of the classes, and MLPs of different width. They train apart in the
first round and from what they are sent in later ones, in Flower's simulation runtime under ``FedRebasin(...,
node_models=...)``. *Sent* is the test score of what a node gets back after a round, in its own width; *trained* what it
makes of it in that round. Beside it each node alone, for as many epochs. No plain average exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedrebasin.simulations.baselines import Score, score
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.settings import Settings, resolve
from fedrebasin.simulations.silo import initial_model, rows_of_nodes, train_round
from fedrebasin.simulations.training import predict
from fedrebasin.strategies import FedRebasin

SPLIT = "biased:0.2"
Row = dict[str, int | float]


@dataclasses.dataclass(frozen=True)
class Federation:
    """Two nodes of different width, and what they do in each round."""

    widths: tuple[int, int]
    seed: int
    rounds: int

    def settings(self, node: int) -> Settings:
        """The node's own."""
        return resolve(Settings(data="digits", partition=SPLIT, width=self.widths[node]))

    def train(self, node: int, server_round: int, received: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, Row]:
        """A node's round: from its own start in the first, then from what it received."""
        settings, data = self.settings(node), load_dataset("digits", None)
        rows = rows_of_nodes(settings, data, 2, seed=self.seed)[0][node]
        net, row = initial_model(settings, data, seed=self.seed, owner=node), {}
        if server_round > 1:
            net.load_state_dict(received)
            row = {f"sent-{key}": value for key, value in _score(net, data).items()}
        epochs = settings.epochs if server_round == 1 else settings.later_epochs
        train_round(net, settings, data, rows, seed=self.seed, owner=node, server_round=server_round, epochs=epochs)
        row |= {f"trained-{key}": value for key, value in _score(net, data).items()}
        return net, {**row, "node": node, "num-examples": len(rows)}


def play(federation: Federation) -> list[dict[str, Any]]:
    """Every node's figures in every round, in Flower's runtime."""
    client, server = ClientApp(), ServerApp()
    found: list[dict[str, Any]] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        number = int(str(message.content.config_records["config"]["server-round"]))
        node = int(str(context.node_config["partition-id"]))
        net, row = federation.train(node, number, message.content.array_records["arrays"].to_torch_state_dict())
        content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({**row})})
        return Message(content, reply_to=message)

    def keep(records: list[RecordDict], key: str) -> MetricRecord:
        found.append({"nodes": sorted((dict(one.metric_records["metrics"]) for one in records), key=_node)})
        return MetricRecord({})

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(1)
        data = load_dataset("digits", None)
        wide, narrow = (initial_model(federation.settings(node), data, seed=federation.seed) for node in (0, 1))
        strategy = FedRebasin(
            model=wide,
            node_models=[narrow],
            example_inputs=(data.normalise(data.train_images[:2]),),
            seed=federation.seed,
            fraction_evaluate=0.0,
            train_metrics_aggr_fn=keep,
        )
        # one round more than is reported: a node scores what a round gave it when the next one begins
        run = strategy.start(grid, ArrayRecord(wide.state_dict()), federation.rounds + 1)
        for number, metrics in run.train_metrics_clientapp.items():
            found[number - 1]["left-out"] = metrics["rebasin-left-out"]

    run_simulation(server, client, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1}})
    return found


def rows_of(federation: Federation, played: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each node and round: sent after it, trained in it, and the node alone for as many epochs."""
    rows = []
    for node, width in enumerate(federation.widths):
        alone: dict[str, torch.Tensor] = {}
        for number in range(1, federation.rounds + 1):
            net, single = federation.train(node, number, alone)
            alone = net.state_dict()
            here, after = (played[place]["nodes"][node] for place in (number - 1, number))
            row: dict[str, Any] = {"seed": federation.seed, "width": width, "round": number}
            for key in ("loss", "accuracy"):
                row |= {f"trained-{key}": here[f"trained-{key}"], f"sent-{key}": after[f"sent-{key}"]}
                row[f"alone-{key}"] = single[f"trained-{key}"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def _score(net: torch.nn.Module, data: Dataset) -> Score:
    return score(predict(net, data, data.test_images, device=torch.device("cpu")), data.test_labels)


def _node(row: dict[str, Any]) -> int:
    return int(row["node"])


def main() -> None:
    """Measure every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs=2, default=(512, 256))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started, widths, rows = time.time(), (options.widths[0], options.widths[1]), []
    for seed in range(options.seeds):
        federation = Federation(widths, seed, options.rounds)
        rows += rows_of(federation, play(federation))
    result = {"experiment": "widths-rounds", "data": "digits", "partition": SPLIT, "widths": list(widths)}
    about = provenance(bench_command("widths_rounds"), list(range(options.seeds)), started)
    save_results(options.output, {**result, "rows": rows, "provenance": about})


if __name__ == "__main__":
    main()
