"""The matching method of a strategy, with the model and the data that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import Matching, PermutationSpec, match_each
from fedrebasin.batches import Batches
from fedrebasin.errors import CalibrationError, RebasinError, UsageError
from fedrebasin.matching.methods import METHODS, Setting, find_matching

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Matcher:
    """A matching method that is ready to be called with a reference and a model."""

    name: str
    setting: Setting

    def __call__(self, reference: State, model: State) -> Matching:
        """Match ``model`` to ``reference``."""
        return find_matching(self.name, self.setting, reference, model)

    def each(self, reference: State, models: Sequence[State]) -> list[Matching]:
        """Match several models to one reference."""
        if self.name == "weight":
            return match_each(self.setting.spec, reference, models, seed=self.setting.seed, device=self.setting.device)
        return [self(reference, model) for model in models]

    @property
    def runs_the_model(self) -> bool:
        """True if it runs the user's model on the user's data, which may raise anything."""
        return METHODS[self.name].given(self.setting.loss).inputs


def uses_loss(name: str) -> bool:
    """Whether a method has a use for a loss.

    >>> uses_loss("straight-through"), uses_loss("weight")
    (True, False)
    """
    return METHODS[name].targets or METHODS[name].choice


def build_matcher(
    name: str,
    spec: PermutationSpec,
    model: nn.Module | None,
    calibration: Any,
    *,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Matcher:
    """Refuse a method that lacks its model, data or loss, and try it: in a round, what fails is only logged.

    Parameters
    ----------
    name : str
        One of :data:`fedrebasin.matching.methods.METHODS`.
    calibration : iterable of batches, optional
        Inputs; with targets if the method needs a loss.

    Examples
    --------
    >>> build_matcher("activation", PermutationSpec({}), nn.Linear(2, 1), None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedrebasin.errors.CalibrationError: matching='activation' needs calibration, a collection of input batches; ...
    """
    method = METHODS[name].given(loss)
    if loss is not None and not method.targets:
        users = " and ".join(repr(other) for other in METHODS if uses_loss(other))
        raise UsageError(
            f"loss: only matching={users} and select='calibration' use it; leave it out with matching={name!r}"
        )
    matcher = Matcher(name, Setting(spec, seed=seed, device=device))
    if not method.inputs:
        return matcher
    if calibration is None:
        kind = "(input, target)" if method.targets else "input"
        raise CalibrationError(
            f"matching={name!r} needs calibration, a collection of {kind} batches; give calibration=batches"
        )
    if model is None:
        raise UsageError(
            f"matching={name!r} runs the model on calibration data, and a spec alone cannot; give model= too, or "
            "matching='weight'"
        )
    if method.targets and loss is None:
        raise UsageError(
            f"matching={name!r} needs loss=, a function of output and target, as torch.nn.functional.cross_entropy"
        )
    next(iter(Batches(calibration, inputs=spec.inputs)))
    state, few = model.state_dict(), list(islice(calibration, 2))
    setting = replace(matcher.setting, net=model, calibration=few, loss=loss)
    try:
        find_matching(name, setting, state, state)
    except RebasinError:
        raise
    except Exception as error:
        raise CalibrationError(f"calibration: the model cannot run on its first batches: {error}") from error
    return replace(matcher, setting=replace(setting, calibration=calibration))
