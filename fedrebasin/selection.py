"""Which of several models is kept: measured on data with which none of them was made."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import batches_of
from fedrebasin.coefficients import check_coefficients
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, correct
from fedrebasin.corrections.working import load, working_copy
from fedrebasin.errors import CalibrationError, RebasinError, first_line
from fedrebasin.finite import first_not_finite
from fedrebasin.yardsticks import ByAgreement, ByLoss, Loss, is_better, mean_over_batches

LOGGER = logging.getLogger("fedrebasin")
State = Mapping[str, Tensor]
Asked = str | Sequence[str] | None
#: A state dict, or a function that makes it when its turn has come.
Candidate = State | Callable[[], State]
#: Squared differences of what float32 rounds: a later candidate must be better by more.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Selection:
    """What was kept, and why.

    Attributes
    ----------
    name : str
    state : dict of str to Tensor
        As it was given or made.
    measure : {"loss", "distance"}
        The distance is from the ensemble of the ends.
    figures : dict of str to float
        Of every candidate, in order; lower is better. NaN: it could not be made, or is not finite.
    examples : int
        On which they were measured.
    """

    name: str
    state: State
    measure: str
    figures: dict[str, float]
    examples: int

    def __str__(self) -> str:
        what = self.measure if self.measure == "loss" else f"{self.measure} from the ensemble"
        table = ", ".join(f"{name} {figure:.4g}" for name, figure in self.figures.items())
        return f"{self.name} is kept; {what} on {self.examples} examples: {table}"


def select_candidate(
    net: nn.Module,
    candidates: Mapping[str, Candidate],
    held_out: Iterable[Any],
    *,
    ends: Sequence[State] = (),
    coefficients: Sequence[float] | None = None,
    alone: Mapping[str, Candidate] | None = None,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
) -> Selection:
    """Keep the best of several state dicts: by loss where there are targets, else by agreement with the ensemble.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    candidates : dict of str to state dict, or to a function of no arguments that returns one
        Merges; of equal ones the first is kept. They are made one after the other, and one that raises, does not fit
        ``net`` or holds a NaN or an infinity is never kept.
    held_out : iterable of batches
        With which no candidate was made; see :func:`fedrebasin.split_calibration`.
    ends : sequence of state dict
        The ensemble; needed where there are no targets or no loss.
    coefficients : sequence of float, optional
        The ends' weights in the ensemble; equal by default.
    alone : dict, optional
        Models that leave out what the others have learnt, such as a single end. One is kept only if its loss is lower
        than the best merge's beyond chance (97.5%, Student's t on the batches' differences): on few examples a single
        model would often seem the best. Without a loss they are not looked at: each agrees with itself in the ensemble.
    loss : callable, optional
        ``loss(output, target)``, a mean over the batch.
    device : torch.device or str, optional
        Where the network runs; by default where ``ends`` are, or without them the candidates.

    Returns
    -------
    Selection

    Raises
    ------
    CalibrationError
        If there is neither a loss with targets nor an ensemble, or some batches have targets and others not.
    RebasinError
        If there is no candidate, or none that is finite.

    Notes
    -----
    Agreement is measured as in :class:`fedrebasin.yardsticks.ByAgreement`.

    Examples
    --------
    >>> net = nn.Linear(2, 2)
    >>> good, bad = net.state_dict(), {"weight": torch.zeros(2, 2), "bias": torch.ones(2)}
    >>> select_candidate(net, {"bad": bad, "good": good}, [torch.randn(8, 2)], ends=[good]).name
    'good'
    """
    if not candidates:
        raise RebasinError("candidates: expected one state dict or more; got none")
    model = working_copy(net, net.state_dict(), device if device is not None else _where(candidates, ends))
    yardstick = _yardstick(model, held_out, ends, coefficients, loss)
    merges = _Contest(model, yardstick)
    for name, candidate in candidates.items():
        merges.enter(name, candidate)
    others = _Contest(model, yardstick)
    for name, candidate in (alone or {}).items() if yardstick.kind == "loss" else ():
        others.enter(name, candidate)
    winner = merges
    if others.state and (not merges.state or is_better(others.values, merges.values, yardstick.sizes)):
        winner = others
    if not winner.state:
        names = ", ".join(candidates)
        raise RebasinError(f"candidates: expected one that is finite; none of {names} is; check the ends, and the log")
    figures = merges.figures | others.figures
    found = Selection(winner.name, winner.state, yardstick.kind, figures, sum(yardstick.sizes))
    LOGGER.info("%s", found)
    return found


def corrected(
    name: str, merged: State, ends: Sequence[State], setting: CorrectionSetting, corrections: Sequence[str]
) -> dict[str, Candidate]:
    """``name``, the average as it is, and ``name+correction`` for each correction, made when its turn has come.

    Examples
    --------
    >>> state = nn.Linear(2, 2).state_dict()
    >>> list(corrected("aligned", state, [state], CorrectionSetting(nn.Linear(2, 2)), ["repair", "least-squares"]))
    ['aligned', 'aligned+repair', 'aligned+least-squares']
    """
    made = {f"{name}+{one}": partial(correct, one, setting, merged, ends) for one in corrections}
    return {name: merged, **made}


def names_of(correction: Asked, *, several: bool, known: Sequence[str] = tuple(CORRECTIONS)) -> tuple[str, ...]:
    """The corrections that are asked for, each known and, without ``several``, one at most.

    Examples
    --------
    >>> names_of(None, several=False), names_of("repair", several=False), names_of(["repair", "regmean"], several=True)
    ((), ('repair',), ('repair', 'regmean'))
    """
    names = () if correction is None else (correction,) if isinstance(correction, str) else tuple(correction)
    for name in names:
        if name not in known:
            raise RebasinError(f"correction: expected None or one of {', '.join(known)}; got {name!r}")
    if not isinstance(correction, str | None) and not several:
        wrong = f"several need something that chooses among them; got {correction!r}"
        raise RebasinError(f"correction: {wrong}; give select='calibration', or one name")
    if len(set(names)) < len(names):
        raise RebasinError(f"correction: expected each name once; got {correction!r}")
    return names


class _Contest:
    """The best of the models that have been entered; only its state dict is held."""

    def __init__(self, model: nn.Module, yardstick: ByLoss | ByAgreement) -> None:
        self.model, self.yardstick = model, yardstick
        self._constants = {name: t.clone() for name, t in model.state_dict().items() if not bool(t.isfinite().all())}
        self.name, self.values = "", torch.tensor([], device="cpu")
        self.state: State = {}
        self.figures: dict[str, float] = {}

    def enter(self, name: str, candidate: Candidate) -> None:
        self.figures[name] = math.nan
        try:
            state = candidate() if callable(candidate) else candidate
            load(self.model, state)
        except Exception as error:  # noqa: BLE001 - whatever a candidate raises
            LOGGER.warning("candidate %s could not be made (%s)", name, first_line(error))
            return
        values = self.yardstick(self.model)
        figure = mean_over_batches(values, self.yardstick.sizes)
        if not math.isfinite(figure) or first_not_finite(state, self._constants) is not None:
            LOGGER.warning("candidate %s holds a NaN or an infinity, or its outputs do", name)
            return
        self.figures[name] = figure
        if not self.state or figure < self.figures[self.name] - _ROUNDING:
            self.name, self.state, self.values = name, state, values


def _yardstick(
    model: nn.Module,
    held_out: Iterable[Any],
    ends: Sequence[State],
    coefficients: Sequence[float] | None,
    loss: Loss | None,
) -> ByLoss | ByAgreement:
    where = next(iter(model.state_dict().values())).device
    batches = batches_of(model, held_out, name="held_out", device=where)
    labelled = {target is not None for _, _, target in batches}
    if loss is not None and len(labelled) > 1:
        raise CalibrationError("held_out: expected targets in all batches or in none; some have none")
    if loss is not None and labelled == {True}:
        return ByLoss(batches, loss)
    if not ends:
        raise CalibrationError(
            "held_out: without targets and loss=, candidates are measured by agreement with the ensemble; give ends="
        )
    return ByAgreement(model, batches, ends, check_coefficients(coefficients, len(ends)))


def _where(candidates: Mapping[str, Candidate], ends: Sequence[State]) -> torch.device:
    states = [*ends, *(candidate for candidate in candidates.values() if not callable(candidate))]
    return next((tensor.device for state in states for tensor in state.values()), torch.device("cpu"))
