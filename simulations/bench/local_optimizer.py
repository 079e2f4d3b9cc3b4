"""Which local training bears a correction in every round: ``python -m fedrebasin.simulations.bench.local_optimizer``.

Four clients start from one model and hold Dirichlet parts. Each round they train, are averaged, and the
average is corrected by queries to them: in every round, in round 1 alone, or beside a federation that goes on from its
averages (in any round that is what a correction in that round alone gives). All else is the same for every optimizer.
With ``--long`` only the last is measured, after some of many rounds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import RebasinError, merge
from fedrebasin.corrections.federated import correct_federated
from fedrebasin.corrections.queries import Case
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.partition import parse_partition, partition_rows
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.silo import batches_of
from fedrebasin.simulations.training import RECIPES, Recipe, predict, train

State = dict[str, Tensor]
NODES, ROUNDS, PARTITION = 4, 5, "dirichlet:0.1"
EPOCHS = {"digits": 5, "cifar10": 1}
#: images of a client that answer queries, at most: all of digits
QUERIED = 2000
#: name, norm, width
NETWORKS = (("mlp", "", 128), ("conv", "batch", 32), ("conv", "layer", 32))
OPTIMIZERS: dict[str, Recipe] = {
    "Adam, rate 0.001": RECIPES["mlp"],
    "SGD, rate 0.01": replace(RECIPES["conv"], lr=0.01, batch=RECIPES["mlp"].batch),
    "SGD, rate 0.1": replace(RECIPES["conv"], batch=RECIPES["mlp"].batch),
}
CORRECTIONS = ("federated-least-squares", "federated-regmean")
#: in which rounds an average is corrected, and whether the next round starts from what comes of it
WHEN = ("never", "every round", "round 1 alone", "the last round alone")
#: of a long federation, the rounds whose averages are measured, as they are and corrected
LONG = {"digits": (5, 10, 20, 40), "cifar10": (5, 10, 20)}
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Federation:
    """The clients of one seed and their training."""

    data: Dataset
    parts: list[Tensor]
    net: nn.Module
    recipe: Recipe
    seed: int

    def ends(self, sent: State, server_round: int) -> list[State]:
        """What the clients send back."""
        found = []
        for node, rows in enumerate(self.parts):
            model, seed = copy.deepcopy(self.net), 1000 * self.seed + 10 * server_round + node
            model.load_state_dict(sent)
            images, labels = self.data.train_images[rows], self.data.train_labels[rows]
            epochs = EPOCHS[self.data.name]
            train(model, self.data, images, labels, recipe=self.recipe, epochs=epochs, seed=seed, device=DEVICE)
            found.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        return found

    def corrected(self, name: str, average: State, ends: list[State]) -> State:
        """By the clients' own images; the average as it is where the correction is refused, as in a strategy."""
        batches = [batches_of(self.data, self._queried(rows)) for rows in self.parts]
        example = batches[0][0][0][:2]
        try:
            case = Case(self.net, average, ends, self.coefficients, example)
            return correct_federated(name, case, batches)
        except RebasinError as error:
            print(f"  not corrected: {error}", flush=True)
            return average

    def _queried(self, rows: Tensor) -> Tensor:
        if len(rows) <= QUERIED:
            return rows
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))[:QUERIED]]

    @property
    def coefficients(self) -> list[float]:
        """Shares of the images."""
        return [len(rows) / sum(map(len, self.parts)) for rows in self.parts]

    def score(self, state: State) -> dict[str, float]:
        """Test loss and accuracy, and the norm of the last layer's weight."""
        model = copy.deepcopy(self.net)
        model.load_state_dict(state)
        logits = predict(model, self.data, self.data.test_images, device=DEVICE)
        right = (logits.argmax(1) == self.data.test_labels).double().mean()
        last = next(tensor for name, tensor in reversed(state.items()) if name.endswith("weight"))
        loss = F.cross_entropy(logits, self.data.test_labels)
        return {"loss": float(loss), "accuracy": float(right), "last-layer": float(last.norm())}


def play(federation: Federation, when: str, name: str) -> list[dict[str, float]]:
    """The scores of every round's model."""
    sent, scores = federation.net.state_dict(), []
    for server_round in range(1, ROUNDS + 1):
        ends = federation.ends(sent, server_round)
        average = merge(ends, coefficients=federation.coefficients)
        used = when in ("every round", "the last round alone") or (when == "round 1 alone" and server_round == 1)
        model = federation.corrected(name, average, ends) if used else average
        scores.append(federation.score(model))
        sent = average if when == "the last round alone" else model
    return scores


def play_long(federation: Federation) -> dict[str, list[dict[str, float]]]:
    """The scores of averages after ``LONG`` rounds, as they are and with each correction, from which nobody goes on."""
    sent, scores = federation.net.state_dict(), dict[str, list[dict[str, float]]]()
    measured = LONG[federation.data.name]
    for server_round in range(1, measured[-1] + 1):
        ends = federation.ends(sent, server_round)
        sent = merge(ends, coefficients=federation.coefficients)
        if server_round in measured:
            models = {"none": sent} | {name: federation.corrected(name, sent, ends) for name in CORRECTIONS}
            for name, model in models.items():
                scores.setdefault(name, []).append(federation.score(model))
    return scores


def measure(
    data: Dataset, network: tuple[str, str, int], optimizer: str, seed: int, long: bool
) -> list[dict[str, Any]]:
    """One row for each way to correct, with the figures of the rounds in lists."""
    name, norm, width = network
    parts = partition_rows(data.train_labels, data.classes, NODES, parse_partition(PARTITION), seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_model(name, data.shape, data.classes, width=width, norm=norm or "batch").eval()
    federation = Federation(data, parts, net, OPTIMIZERS[optimizer], seed)
    if long:
        scored = {("never" if name == "none" else WHEN[-1], name): own for name, own in play_long(federation).items()}
    else:
        ways = [("never", "none"), *itertools.product(WHEN[1:], CORRECTIONS)]
        scored = {way: play(federation, *way) for way in ways}
    rows = []
    for (when, correction), scores in scored.items():
        figures = {key: [float(f"{score[key]:.5g}") for score in scores] for key in scores[0]}
        where = {"network": f"{name} {norm}".strip(), "width": width, "optimizer": optimizer, "seed": seed}
        rows.append({**where, "when": when, "correction": correction, **figures})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure every network, optimizer and seed; the file is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(3)))
    parser.add_argument("--long", action="store_true", help="many rounds, corrected at their end alone")
    parser.add_argument("--dataset", choices=list(LONG), default="digits")
    parser.add_argument("--data", help="folder of Parquet files")
    parser.add_argument("--only", default="", metavar="TEXT", help="of networks and optimizers, as 'conv batch, SGD'")
    options = parser.parse_args()
    started, data, rows = time.time(), load_dataset(options.dataset, options.data), []
    for network, optimizer, seed in itertools.product(NETWORKS, OPTIMIZERS, options.seeds):
        if options.only not in f"{network[0]} {network[1]}".strip() + f", {optimizer}":
            continue
        rows += measure(data, network, optimizer, seed, options.long)
        about = {"experiment": "bench-local-optimizer", "data": data.name, "nodes": NODES, "partition": PARTITION}
        about |= {
            "epochs": EPOCHS[data.name],
            "rounds": list(LONG[data.name] if options.long else range(1, ROUNDS + 1)),
        }
        made = provenance(bench_command("local_optimizer", {"--data": "FOLDER"}), options.seeds, started)
        save_results(options.output, {**about, "rows": rows, "provenance": made})


if __name__ == "__main__":
    main()
