"""The matching method of a strategy, with the model and the data that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import ManyMatching, Matching, PermutationSpec, match_many
from fedrebasin.allocator import return_freed_memory, size_of
from fedrebasin.batches import Batches
from fedrebasin.errors import CalibrationError, RebasinError, UsageError
from fedrebasin.matching.many import ON_DATA
from fedrebasin.matching.methods import METHODS, MatchingSetting, find_matching

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Matcher:
    """A matching method that is ready to be called with a reference and a model."""

    name: str
    setting: MatchingSetting

    def __call__(self, reference: State, model: State) -> Matching:
        """Match ``model`` to ``reference``."""
        found = find_matching(self.name, self.setting, reference, model)
        return_freed_memory(size_of(model))
        return found

    def many(self, method: str, models: Sequence[State], coefficients: Sequence[float]) -> ManyMatching:
        """Match several models to each other, on data if the method and this matcher have a loss."""
        data: dict[str, Any] = {}
        if method == ON_DATA and self.setting.loss is not None:
            data = {"net": self.setting.net, "batches": self.setting.calibration, "loss": self.setting.loss}
        seed, device = self.setting.seed, self.setting.device
        return match_many(
            self.setting.spec, models, coefficients=coefficients, method=method, seed=seed, device=device, **data
        )

    @property
    def label(self) -> str:
        """The option behind it, for messages."""
        joint = self.runs_the_model and not METHODS[self.name].given(self.setting.loss).inputs
        return f"reference={ON_DATA!r} with a loss" if joint else f"matching={self.name!r}"

    @property
    def runs_the_model(self) -> bool:
        """True if it runs the user's model on the user's data, which may raise anything."""
        return self.setting.net is not None


def uses_loss(name: str, reference: str = "auto") -> bool:
    """Whether a method, or a joint reference, has a use for a loss.

    >>> uses_loss("straight-through"), uses_loss("weight"), uses_loss("weight", "straight-through-many")
    (True, False, True)
    """
    return METHODS[name].targets or METHODS[name].choice or reference == ON_DATA


def build_matcher(
    name: str,
    spec: PermutationSpec,
    model: nn.Module | None,
    calibration: Any,
    *,
    reference: str = "auto",
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
    reference : str
        ``"straight-through-many"`` learns from the data too, if there is a loss.

    Examples
    --------
    >>> build_matcher("activation", PermutationSpec({}), nn.Linear(2, 1), None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedrebasin.errors.CalibrationError: matching='activation' needs calibration, a collection of input batches; ...
    """
    method, what = METHODS[name].given(loss), f"matching={name!r}"
    joint = reference == ON_DATA and loss is not None
    if joint:
        method, what = replace(method, inputs=True, targets=True), f"reference={reference!r} with a loss"
    if loss is not None and not method.targets:
        users = " and ".join(repr(other) for other in METHODS if uses_loss(other))
        raise UsageError(
            f"loss: only matching={users}, reference={ON_DATA!r} and select='calibration' use it; leave it out with "
            f"matching={name!r}"
        )
    matcher = Matcher(name, MatchingSetting(spec, seed=seed, device=device))
    if not method.inputs:
        return matcher
    if calibration is None:
        kind = "(input, target)" if method.targets else "input"
        raise CalibrationError(f"{what} needs calibration, a collection of {kind} batches; give calibration=batches")
    if model is None:
        raise UsageError(
            f"{what} runs the model on calibration data, and a spec alone cannot; give model= too, or matching='weight'"
        )
    if method.targets and loss is None:
        raise UsageError(f"{what} needs loss=, a function of output and target, as torch.nn.functional.cross_entropy")
    next(iter(Batches(calibration, inputs=spec.inputs)))
    state, few = model.state_dict(), list(islice(calibration, 2))
    setting = replace(matcher.setting, net=model, calibration=few, loss=loss)
    try:
        if joint:
            Matcher(name, setting).many(reference, [state, state], [0.5, 0.5])
        else:
            find_matching(name, setting, state, state)
    except RebasinError:
        raise
    except Exception as error:
        raise CalibrationError(f"calibration: the model cannot run on its first batches: {error}") from error
    return replace(matcher, setting=replace(setting, calibration=calibration))
