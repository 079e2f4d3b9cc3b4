"""``select="calibration"``: which model a round hands back, measured on data that nothing else has seen.

Candidates are what the inner strategy made of the aligned replies, and in a round apart, or around FedAvg and FedProx,
the average of the replies as they came; each as it is and with every correction. Where there are targets and a loss,
each reply alone competes too, and has to be better beyond chance. The model that was sent does not: clients that train
from it once more bring back much the same, and federations stopped for good (``simulations/results/which-model.md``).

Metrics: ``rebasin-selected``, the place of what is kept in ``Selector.names``, and ``rebasin-MEASURE-CANDIDATE`` for
each candidate, where MEASURE is ``loss``, or without one ``distance`` (from the ensemble). A round holds its replies in
memory up to twice more, as they came and aligned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy
from torch import Tensor, nn

from fedrebasin import split_calibration
from fedrebasin.batches import as_called
from fedrebasin.corrections.methods import CorrectionSetting
from fedrebasin.errors import CalibrationError, UsageError
from fedrebasin.selection import Candidate, Selection, corrected, select_candidate
from fedrebasin.strategies.alignment import shares
from fedrebasin.strategies.buffers import average_states
from fedrebasin.strategies.records import cast_arrays, record_to_state, select_arrays, state_to_record
from fedrebasin.strategies.reply import Reply
from fedrebasin.yardsticks import Loss

State = dict[str, Tensor]
#: how the best of the replies themselves is called
CLIENT = "best-client"


@dataclass(frozen=True)
class Round:
    """What a round has to choose from.

    Attributes
    ----------
    model : ArrayRecord
        What the inner strategy made of the aligned replies.
    plain : list of ArrayRecord
        The replies as they came; empty where their average is no candidate.
    ends : list of state dict
        The aligned replies.
    replies : list of Reply
    """

    model: ArrayRecord
    plain: list[ArrayRecord]
    ends: list[State]
    replies: list[Reply]

    def paths(self) -> dict[str, tuple[State, list[State]]]:
        """What candidates are made of: for ``plain``, where it is one, and ``aligned`` the average and its ends."""
        found = {"aligned": (record_to_state(self.model), self.ends)}
        if not self.plain:
            return found
        states = [record_to_state(record) for record in self.plain]
        return {"plain": (average_states(states, shares(self.replies)), states), **found}


@dataclass(frozen=True)
class Selector:
    """Measures the candidates of a round, and keeps one.

    Attributes
    ----------
    model : nn.Module
    corrections : tuple of str
    names : tuple of str
        Of all candidates there can be; the metric ``rebasin-selected`` counts along it, from 0.
    fit, held_out : list of batches
        The calibration data's two parts: for the corrections, and for the measurement.
    loss : callable, optional
        With it and targets candidates are measured by loss, otherwise by agreement with the replies' ensemble.
    """

    model: nn.Module
    corrections: tuple[str, ...]
    fit: list[Any]
    held_out: list[Any]
    loss: Loss | None = None
    example_inputs: Any = None
    seed: int = 0
    device: torch.device | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (*names_of_candidates(self.corrections), CLIENT))

    def choose(self, found: Round) -> tuple[ArrayRecord | None, dict[str, float]]:
        """The model to keep, ``None`` if it is the one that is there, and the figures as metrics.

        Nothing is raised: what goes wrong is logged, and the model stays.
        """
        try:
            selection = self._select(found)
        except Exception as error:  # noqa: BLE001 - the user's model, data and loss may raise anything
            log(WARNING, "rebasin: selection failed (%s: %s); the aggregate stays", type(error).__name__, error)
            return None, {}
        log(INFO, "aggregate_train: %s", selection)
        figures = _metrics(selection, self.names)
        if selection.name == "aligned":
            return None, figures
        return cast_arrays(state_to_record(dict(selection.state)), found.model), figures

    def _select(self, found: Round) -> Selection:
        coefficients = shares(found.replies)
        setting = CorrectionSetting(self.model, self.fit, coefficients, self.example_inputs, self.seed, self.device)
        candidates: dict[str, Candidate] = {}
        for path, (merged, ends) in found.paths().items():
            candidates |= corrected(path, merged, ends, setting, self.corrections)
        clients: dict[str, Candidate] = {
            f"node {reply.node}": end for reply, end in zip(found.replies, found.ends, strict=True)
        }
        return select_candidate(
            *(self.model, candidates, as_called(self.held_out, self.example_inputs)),
            ends=found.ends,
            coefficients=coefficients,
            alone=clients,
            loss=self.loss,
            device=self.device,
        )


def build_selector(
    select: str | None,
    corrections: Sequence[str],
    model: nn.Module | None,
    calibration: Any,
    *,
    loss: Loss | None = None,
    example_inputs: Any = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Selector | None:
    """Part the calibration data, or refuse what selection lacks; ``None`` if it is not asked for.

    Examples
    --------
    >>> build_selector("calibration", ["repair"], nn.Linear(2, 1), None)
    Traceback (most recent call last):
    ...
    fedrebasin.errors.CalibrationError: select='calibration' needs calibration, a collection of input batches
    """
    if select is None:
        return None
    if calibration is None:
        raise CalibrationError(f"select={select!r} needs calibration, a collection of input batches")
    if model is None:
        raise UsageError(
            f"select={select!r} runs the model on calibration data, and a spec alone cannot; give model= too"
        )
    fit, held_out = split_calibration(model, as_called(calibration, example_inputs), seed=seed)
    return Selector(model, tuple(corrections), fit, held_out, loss, example_inputs, seed, device)


def only_averages(strategy: Strategy | legacy.Strategy) -> bool:
    """Tell whether a strategy is known to do no more than average the replies.

    >>> only_averages(FedAvg())
    True
    """
    return type(strategy) in (FedAvg, FedProx, legacy.FedAvg, legacy.FedProx)


def plain_replies(
    replies: Sequence[Reply], strategy: Strategy | legacy.Strategy, *, moves: bool, outside: bool
) -> list[ArrayRecord]:
    """The replies' arrays before they are permuted, no array copied, where their average is a candidate of its own.

    It is none where nothing moves, or where the inner strategy does more than average: its step would be left out.
    """
    if not moves or not (outside or only_averages(strategy)):
        return []
    return [select_arrays(reply.arrays, list(reply.arrays)) for reply in replies]


def names_of_candidates(corrections: Sequence[str]) -> tuple[str, ...]:
    """Plain and aligned, each as it is and with every correction.

    >>> names_of_candidates(["repair"])
    ('plain', 'plain+repair', 'aligned', 'aligned+repair')
    """
    ends = ("", *(f"+{one}" for one in corrections))
    return tuple(f"{path}{end}" for path in ("plain", "aligned") for end in ends)


def _metrics(selection: Selection, names: Sequence[str]) -> dict[str, float]:
    """Numbers for a MetricRecord: the place of what is kept in ``names``, and the figures that are finite."""
    figures = {name: value for name, value in selection.figures.items() if name in names}
    clients = [value for name, value in selection.figures.items() if name not in names and math.isfinite(value)]
    if clients:
        figures[CLIENT] = min(clients)
    place = names.index(selection.name if selection.name in names else CLIENT)
    found = {f"rebasin-{selection.measure}-{name}": value for name, value in figures.items() if math.isfinite(value)}
    return {"rebasin-selected": place, **found}
