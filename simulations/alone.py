"""What needs no federation: each silo alone, the ensemble of them, and one model on everybody's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.simulations.attendance import local_epochs
from fedrebasin.simulations.baselines import Score, client_baselines, score
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.settings import Settings, join_round
from fedrebasin.simulations.silo import initial_model, train_round
from fedrebasin.simulations.training import predict, select_device


class Alone:
    """The baselines of one seed.

    Silos that start apart are scored by the ends that they send. Otherwise no silo ever trains alone, so it is done
    here, from each one's own initialisation and for as many epochs as a node that is always there trains in all rounds.

    Parameters
    ----------
    rows : sequence of Tensor
        The row numbers that each silo trains on.
    """

    def __init__(self, settings: Settings, data: Dataset, rows: Sequence[Tensor], seed: int) -> None:
        self.settings, self.data, self.rows, self.seed = settings, data, rows, seed
        #: what all silos train on, in the data set's order
        self.all_rows = torch.cat(list(rows)).sort().values
        self.device = select_device(settings.device)
        # made here, not in the thread that trains: fresh weights are drawn from torch's one global generator
        own = [] if settings.start == "apart" else range(len(rows))
        self.silos = [initial_model(settings, data, seed=seed, owner=node) for node in own]
        self.model_of_all = initial_model(settings, data, seed=seed, owner=len(rows))
        #: node -> logits on the test images of what it trained apart
        self.ends: dict[int, Tensor] = {}

    def train(self) -> Score:
        """Train what no node trains, and score the model of all rows."""
        for node, model in enumerate(self.silos):
            self._train(model, self.rows[node], node)
        self._train(self.model_of_all, self.all_rows, len(self.rows))
        return score(self.logits(self.model_of_all), self.data.test_labels)

    def _train(self, model: nn.Module, rows: Tensor, owner: int) -> None:
        epochs = epochs_alone(self.settings, len(self.rows))
        train_round(model, self.settings, self.data, rows, seed=self.seed, owner=owner, server_round=1, epochs=epochs)

    def logits(self, model: nn.Module) -> Tensor:
        return predict(model, self.data, self.data.test_images, device=self.device)

    def entry(self, all_data: Score) -> dict[str, Any]:
        """The seed's baselines, once all strategies have run and ``train`` is done."""
        silos = dict(enumerate(map(self.logits, self.silos))) or self.ends
        entry = {"seed": self.seed, **self._scores(silos), "all_data": all_data}
        if join_round(self.settings.start):
            ends: Any = self._scores(self.ends)
            entry["joins"] = ends["clients"][0]
        return entry

    def _scores(self, logits: Mapping[int, Tensor]) -> dict[str, Any]:
        nodes = sorted(logits)
        labels = [self.data.train_labels[self.rows[node]] for node in nodes]
        return client_baselines(
            [logits[node] for node in nodes], labels, self.data.test_labels, self.data.classes, nodes=nodes
        )


def epochs_alone(settings: Settings, nodes: int) -> int:
    """For how many epochs a baseline trains: a silo's first training apart, else all rounds of a node that is there.

    >>> [epochs_alone(Settings(start=start, epochs=9, later_epochs=5), 3) for start in ("apart", "common", "joins:3")]
    [9, 19, 15]
    """
    if settings.start == "apart":
        return settings.epochs
    rounds = range(1, settings.rounds + 1)
    return sum(local_epochs(settings, nodes, 0, seed=0, server_round=number) for number in rounds)
