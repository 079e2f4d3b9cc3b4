"""What one node does in a round: its rows, its start, and its training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.partition import hold_apart, parse_partition, partition_rows
from fedrebasin.simulations.settings import Settings
from fedrebasin.simulations.training import RECIPES, Progress, Recipe, select_device, train

#: purposes that random numbers are drawn for, so that no two share a seed
_INITIAL, _TRAINING = 0, 1


def rows_of_nodes(settings: Settings, data: Dataset, nodes: int, *, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The rows that each node trains on, and those that it measures merged models on: none unless nodes select.

    Examples
    --------
    >>> from fedrebasin.simulations.data import load_dataset
    >>> rows, held = rows_of_nodes(Settings(select="clients"), load_dataset("digits"), 2, seed=0)
    >>> [len(part) for part in (*rows, *held)]
    [539, 540, 134, 134]
    """
    dealt = partition_rows(data.train_labels, data.classes, nodes, parse_partition(settings.partition), seed=seed)
    if settings.select != "clients":
        return dealt, [part[:0] for part in dealt]
    rows, held = zip(*(hold_apart(part, seed=seed) for part in dealt), strict=True)
    return list(rows), list(held)


def batches_of(data: Dataset, rows: Tensor, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    """Training images of these rows as a network takes them, and their labels, in batches.

    >>> from fedrebasin.simulations.data import load_dataset
    >>> [len(labels) for _, labels in batches_of(load_dataset("digits"), torch.arange(300))]
    [250, 50]
    """
    return [(data.normalise(data.train_images[part]), data.train_labels[part]) for part in torch.split(rows, size)]


def initial_model(settings: Settings, data: Dataset, *, seed: int, owner: int = -1) -> nn.Module:
    """The network with fresh weights: the server's (owner -1) or a node's own.

    Examples
    --------
    >>> from fedrebasin.simulations.data import load_dataset
    >>> settings = Settings(model="mlp", width=4)
    >>> a, b = (initial_model(settings, load_dataset("digits"), seed=0, owner=owner) for owner in (0, 1))
    >>> torch.equal(a[1].weight, b[1].weight)
    False
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, _INITIAL, owner, 0))
        return build_model(settings.model, data.shape, data.classes, width=settings.width, norm=settings.norm)


def train_round(
    model: nn.Module,
    settings: Settings,
    data: Dataset,
    rows: Tensor,
    *,
    seed: int,
    owner: int,
    server_round: int,
    epochs: int,
    prox: float = 0.0,
    progress: Progress | None = None,
) -> float:
    """Train ``model`` in place on ``rows`` and return the mean loss of its last epoch.

    The order of the batches depends on seed, owner and round alone, not on the strategy.
    """
    usual = RECIPES[settings.model]
    recipe = Recipe(usual.optimizer, usual.lr, usual.batch, usual.schedule, usual.weight_decay, prox)
    device = select_device(settings.device)
    loss = train(
        model,
        data,
        data.train_images[rows],
        data.train_labels[rows],
        recipe=recipe,
        epochs=epochs,
        seed=_seed(seed, _TRAINING, owner, server_round),
        device=device,
        progress=progress,
    )
    model.to("cpu")
    return loss


def _seed(seed: int, purpose: int, owner: int, server_round: int) -> int:
    return int(np.random.SeedSequence([seed, purpose, owner + 1, server_round]).generate_state(1)[0])
