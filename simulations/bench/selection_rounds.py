"""Selection round after round: what a federation gains, and whether it gets stuck on a model that it has."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import merge, select_candidate, split_calibration
from fedrebasin.corrections.methods import CorrectionSetting
from fedrebasin.selection import Candidate, corrected
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.partition import parse_partition, partition_rows
from fedrebasin.simulations.silo import batches_of
from fedrebasin.simulations.training import RECIPES, predict, train

#: what is chosen from, besides nothing: merges with and without REPAIR, each client, the model before the round
VARIANTS = ("no selection", "merges", "merges, clients", "merges, clients, sent")
DEVICE = torch.device("cpu")
WIDTH, ROUNDS, SERVERS = 128, 6, 347


@dataclass(frozen=True)
class Federation:
    """Clients that start from the server's model; ``trained`` epochs on 300 of their images lie behind it."""

    partition: str
    nodes: int
    epochs: int
    trained: int


FEDERATIONS = (
    Federation("biased:0.05", nodes=2, epochs=5, trained=0),
    Federation("dirichlet:0.05", nodes=5, epochs=20, trained=8),
)


def play(data: Dataset, federation: Federation, variant: str, seed: int) -> dict[str, Any]:
    """Test loss and accuracy of every round, and what was kept, with labels on the server."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(11))
    server, clients = order[:SERVERS], order[SERVERS:]
    partition = parse_partition(federation.partition)
    parts = partition_rows(data.train_labels[clients], data.classes, federation.nodes, partition, seed=seed)
    net = _start(data, clients, federation, seed)
    batches = batches_of(data, server, 64)
    fit, held_out = split_calibration(net, batches, seed=seed)
    scores, kept = [_score(net, data)], []
    for server_round in range(1, ROUNDS + 1):
        sent = _state(net)
        states = [
            _trained(net, data, clients[rows], federation.epochs, 1000 * seed + 10 * server_round + node)
            for node, rows in enumerate(parts)
        ]
        coefficients = [len(rows) for rows in parts]
        average = merge(states, coefficients=coefficients)
        if variant == "no selection":
            net.load_state_dict(average)
        else:
            clients_alone = {f"client {node}": state for node, state in enumerate(states)}
            alone: dict[str, Candidate] = {}
            alone |= clients_alone if "clients" in variant else {}
            alone |= {"sent": sent} if "sent" in variant else {}
            found = select_candidate(
                net,
                corrected("aligned", average, states, CorrectionSetting(net, fit, coefficients), ["repair"]),
                held_out,
                alone=alone,
                loss=F.cross_entropy,
            )
            kept.append(found.name)
            net.load_state_dict(found.state)
        scores.append(_score(net, data))
    losses, top1 = zip(*scores, strict=True)
    where = {"partition": federation.partition, "nodes": federation.nodes, "epochs": federation.epochs}
    return {**where, "trained": federation.trained, "variant": variant, "seed": seed, "kept": kept, "loss": losses} | {
        "top1": top1
    }


def _start(data: Dataset, clients: Tensor, federation: Federation, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_model("mlp", data.shape, data.classes, width=WIDTH)
    if federation.trained:
        rows = clients[torch.randperm(len(clients), generator=torch.Generator().manual_seed(seed))[:300]]
        net.load_state_dict(_trained(net, data, rows, federation.trained, seed))
    return net


def _trained(net: nn.Module, data: Dataset, rows: Tensor, epochs: int, seed: int) -> dict[str, Tensor]:
    model, recipe = copy.deepcopy(net), replace(RECIPES["mlp"], schedule="constant")
    images, labels = data.train_images[rows], data.train_labels[rows]
    train(model, data, images, labels, recipe=recipe, epochs=epochs, seed=seed, device=DEVICE)
    return _state(model)


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def _score(net: nn.Module, data: Dataset) -> tuple[float, float]:
    logits = predict(net, data, data.test_images, device=DEVICE)
    right = (logits.argmax(1) == data.test_labels).double().mean()
    return round(float(F.cross_entropy(logits, data.test_labels)), 5), round(float(right), 5)
