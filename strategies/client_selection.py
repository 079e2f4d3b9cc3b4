"""``select="clients"``: which model a round hands back, measured by its nodes on labelled data that they hold out.

Candidates are as for ``select="calibration"`` (``selection.py``), single replies apart: plain and aligned average, each
as it is and with every correction, federated ones included. One query brings them all to every node, and each example
that a node measures on counts once. A node that does not answer, or whose losses are no numbers, does not vote.

Metrics: ``rebasin-selected``, the place of what is kept in ``ClientSelector.names``, ``rebasin-loss-CANDIDATE`` for
each, ``rebasin-voters``, and those of the queries (``federated.py``), corrections and votes together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from torch import Tensor, nn

from fedrebasin.corrections.federated import FEDERATED
from fedrebasin.corrections.methods import CorrectionSetting
from fedrebasin.strategies.alignment import shares
from fedrebasin.strategies.correction import correct
from fedrebasin.strategies.federated import Queries
from fedrebasin.strategies.records import cast_arrays, state_to_record
from fedrebasin.strategies.selection import Round, names_of_candidates

State = dict[str, Tensor]


@dataclass(frozen=True)
class ClientSelector:
    """Has the nodes measure the candidates of a round, and keeps one.

    Attributes
    ----------
    names : tuple of str
        Of all candidates there can be; the metric ``rebasin-selected`` counts along it, from 0.
    """

    model: nn.Module
    corrections: tuple[str, ...]
    queries: Queries
    calibration: Any = None
    example_inputs: Any = None
    seed: int = 0
    device: torch.device | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", names_of_candidates(self.corrections))

    def choose(self, found: Round) -> tuple[ArrayRecord | None, dict[str, float]]:
        """The model to keep, ``None`` if it is the one that is there, and the figures as metrics.

        Nothing is raised: what goes wrong is logged, and the model stays.
        """
        figures: dict[str, float] = {}
        kept: State | None = None
        try:
            candidates = dict(self._candidates(found))
            votes = self.queries.vote(candidates, [reply.node for reply in found.replies])
            log(INFO, "aggregate_train: %s", votes)
            kept = candidates[votes.name] if votes.name != "aligned" else None
            losses = {f"rebasin-loss-{name}": loss for name, loss in votes.figures.items() if math.isfinite(loss)}
            figures = {"rebasin-selected": self.names.index(votes.name), "rebasin-voters": votes.voters, **losses}
        except Exception as error:  # noqa: BLE001 - the network, the user's model and numbers may raise anything
            log(WARNING, "rebasin: selection failed (%s: %s); the aggregate stays", type(error).__name__, error)
        figures |= self.queries.metrics
        return None if kept is None else cast_arrays(state_to_record(kept), found.model), figures

    def _candidates(self, found: Round) -> Iterator[tuple[str, State]]:
        coefficients, nodes = shares(found.replies), [reply.node for reply in found.replies]
        setting = CorrectionSetting(
            self.model, self.calibration, coefficients, self.example_inputs, self.seed, self.device
        )
        for path, (merged, ends) in found.paths().items():
            yield path, merged
            for name in self.corrections:
                if name in FEDERATED:
                    state = self.queries.correct(name, merged, ends, coefficients, nodes)
                else:
                    state = correct(name, setting, merged, ends)
                if state is not None:
                    yield f"{path}+{name}", state
