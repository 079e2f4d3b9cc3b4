"""One round under SecAgg+, in which the server sees no model.

Clients train from their own initialisations on their own classes of digits, and align with ``rebasin_mod`` to a model
that the server broadcasts: one that it trained on a tenth of the rows, which no client has, or a random one. Flower's
simulation runtime and legacy workflow, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import Grid
from flwr.simulation import run_simulation
from torch import Tensor, nn

from fedrebasin import PermutationSpec, align, check_spec, merge, trace
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.partition import parse_partition, partition_rows
from fedrebasin.simulations.training import RECIPES, predict, train
from fedrebasin.strategies import rebasin_mod

State = dict[str, Tensor]
Arrays = list[np.ndarray]
CPU = torch.device("cpu")
BROADCASTS = ("trained", "random")


@dataclass(frozen=True)
class Settings:
    """The experiment: nodes, training and data; 3 nodes are the fewest that SecAgg+ shares keys among."""

    nodes: int = 3
    width: int = 128
    epochs: int = 30
    partition: str = "biased:0.2"


def network(settings: Settings, seed: int) -> nn.Module:
    """An untrained network."""
    torch.manual_seed(seed)
    return build_model("mlp", (1, 8, 8), 10, width=settings.width)


def rows_of(settings: Settings, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The server's rows, and those of each node."""
    data = load_dataset("digits")
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    public, private = order[: len(order) // 10], order[len(order) // 10 :]
    labels = data.train_labels[private]
    dealt = partition_rows(labels, data.classes, settings.nodes, parse_partition(settings.partition), seed=seed)
    return public, [private[rows] for rows in dealt]


@lru_cache(maxsize=64)
def trained(settings: Settings, seed: int, node: int) -> tuple[State, int]:
    """The model that a node trained from its own start, and on how many examples; the server is node -1."""
    torch.set_num_threads(1)
    data = load_dataset("digits")
    public, private = rows_of(settings, seed)
    rows = public if node < 0 else private[node]
    net, own = network(settings, 1000 * seed + node + 2), 1000 * seed + node + 2
    images, labels = data.train_images[rows], data.train_labels[rows]
    train(net, data, images, labels, recipe=RECIPES["mlp"], epochs=settings.epochs, seed=own, device=CPU)
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}, len(rows)


def accuracy(settings: Settings, state: Mapping[str, Tensor]) -> float:
    """On the test images."""
    data, net = load_dataset("digits"), network(settings, 0)
    net.load_state_dict(state)
    return float((predict(net, data, data.test_images, device=CPU).argmax(1) == data.test_labels).double().mean())


def broadcast(settings: Settings, seed: int, kind: str) -> State:
    """What the server sends."""
    return trained(settings, seed, -1)[0] if kind == "trained" else dict(network(settings, 5000 + seed).state_dict())


class Client(NumPyClient):
    """Answers with the model that it trained from its own start."""

    def __init__(self, settings: Settings, node: int) -> None:
        self.settings, self.node = settings, node

    def fit(self, parameters: Arrays, config: Mapping[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
        state, examples = trained(self.settings, int(config["seed"]), self.node)
        return [tensor.numpy() for tensor in state.values()], examples, {}


class WatchedGrid:
    """A grid that counts the replies in which the server can see a model."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.models = grid, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        contents = [reply.content for reply in replies if reply.has_content()]
        self.models += sum(bool(record) for content in contents for record in content.array_records.values())
        return replies


def secure_rounds(settings: Settings, cases: Sequence[tuple[int, str]], mods: Sequence[Any]) -> tuple[list[State], int]:
    """Run one SecAgg+ round for each case of seed and broadcast, in one simulation.

    Returns
    -------
    list of state dict, int
        The aggregated models, and in how many replies the server could see a model.
    """
    results: list[State] = []
    seen: list[int] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        watched: Any = WatchedGrid(grid)
        for seed, kind in cases:
            sent = broadcast(settings, seed, kind)
            strategy = FedAvg(
                fraction_evaluate=0.0,
                min_fit_clients=settings.nodes,
                min_available_clients=settings.nodes,
                initial_parameters=ndarrays_to_parameters([tensor.numpy() for tensor in sent.values()]),
                on_fit_config_fn=_config(seed),
            )
            legacy = LegacyContext(context, ServerConfig(num_rounds=1), strategy)
            secure = SecAggPlusWorkflow(num_shares=settings.nodes, reconstruction_threshold=settings.nodes - 1)
            DefaultWorkflow(fit_workflow=secure)(watched, legacy)
            record = legacy.state.array_records[MAIN_PARAMS_RECORD]
            arrays = [array.numpy() for array in record.values()]
            if any(np.array_equal(array, tensor) for array, tensor in zip(arrays, sent.values(), strict=True)):
                raise RuntimeError(f"the secure round of seed {seed} came to nothing; the log says why")
            results.append({name: torch.from_numpy(array).float() for name, array in zip(sent, arrays, strict=True)})
        seen.append(watched.models)

    def client_fn(context: Context) -> Any:
        return Client(settings, int(str(context.node_config["partition-id"]))).to_client()

    resources: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0}}
    client = ClientApp(client_fn=client_fn, mods=list(mods))
    run_simulation(server, client, num_supernodes=settings.nodes, backend_config=resources)
    return results, seen[0]


def _config(seed: int) -> Callable[[int], dict[str, Any]]:
    return lambda server_round: {"seed": seed}


def checked_spec(settings: Settings) -> PermutationSpec:
    """What is shipped to the clients."""
    net, inputs = network(settings, 0), (torch.zeros(2, 1, 8, 8),)
    return check_spec(net, trace(net, inputs), inputs)


def measure(settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """Accuracies of one secure round with and without the mod, and of what they are to be compared with."""
    spec = checked_spec(settings)
    cases = [(seed, kind) for seed in seeds for kind in BROADCASTS]
    aligned, seen = secure_rounds(settings, cases, [secaggplus_mod, rebasin_mod(spec=spec)])
    plain, seen_without = secure_rounds(settings, [(seed, "trained") for seed in seeds], [secaggplus_mod])
    rows = []
    for place, seed in enumerate(seeds):
        ends = [trained(settings, seed, node) for node in range(settings.nodes)]
        row: dict[str, Any] = {"seed": seed, "examples": [examples for _, examples in ends]}
        row["clients-alone"] = [accuracy(settings, state) for state, _ in ends]
        row["secure-plain"] = accuracy(settings, plain[place])
        for kind in BROADCASTS:
            sent, found = broadcast(settings, seed, kind), aligned[cases.index((seed, kind))]
            total = sum(row["examples"])
            merged = merge(
                [align(spec, sent, state) for state, _ in ends], coefficients=[count / total for _, count in ends]
            )
            row[f"broadcast-{kind}"] = accuracy(settings, sent)
            row[f"secure-aligned-to-{kind}"] = accuracy(settings, found)
            row[f"open-aligned-to-{kind}"] = accuracy(settings, merged)
            row[f"quantisation-{kind}"] = max(float((found[name] - merged[name]).abs().max()) for name in merged)
        rows.append(row)
    return {"experiment": "secure", "settings": asdict(settings), "models-seen": seen + seen_without, "rows": rows}
