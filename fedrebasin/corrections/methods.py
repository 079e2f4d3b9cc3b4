"""Every correction by its name, and what each needs besides the merged network and its ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import as_called, batches_of
from fedrebasin.corrections.best_end import best_end
from fedrebasin.corrections.bias_normalisation import bias_normalisation
from fedrebasin.corrections.closed_form import closed_form
from fedrebasin.corrections.distill import distill
from fedrebasin.corrections.least_squares import least_squares
from fedrebasin.corrections.regmean import regmean
from fedrebasin.corrections.repair import repair
from fedrebasin.corrections.rescale import rescale
from fedrebasin.corrections.reset import reset_batchnorm
from fedrebasin.corrections.reshift import reshift
from fedrebasin.errors import CalibrationError, RebasinError

State = Mapping[str, Tensor]
#: Adam's rate after a closed form: it has done most already, and the rate of ``distill`` alone undoes part of it.
GENTLE_LR = 3e-4
#: Epochs over data that is read anew in each.
PATIENT_EPOCHS = 40


@dataclass(frozen=True)
class CorrectionSetting:
    """What a correction may use; ``calibration`` is for those that need inputs, ``example_inputs`` for the others."""

    net: nn.Module
    calibration: Iterable[Any] | None = None
    coefficients: Sequence[float] | None = None
    example_inputs: Any = None
    seed: int = 0
    device: torch.device | str | None = None

    @property
    def batches(self) -> Iterable[Any]:
        """``calibration``, to be read with the inputs that ``example_inputs`` have."""
        assert self.calibration is not None
        return as_called(self.calibration, self.example_inputs)


@dataclass(frozen=True)
class Correction:
    """How a correction is called, what it looks at (calibration inputs, ends, merge), and if it rereads the inputs."""

    run: Callable[[CorrectionSetting, State, Sequence[State]], dict[str, Tensor]]
    inputs: bool = True
    ends: bool = True
    merge: bool = True
    rereads: bool = False


def correct(name: str, setting: CorrectionSetting, merged: State, ends: Sequence[State]) -> dict[str, Tensor]:
    """Correct ``merged``, the average of the aligned ``ends``, by the method that is called ``name``.

    Raises
    ------
    RebasinError
        If there is no such correction, or ``setting`` lacks what it needs; what the method raises itself.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> state = net.state_dict()
    >>> list(correct("least-squares", CorrectionSetting(net, [torch.randn(200, 4)]), state, [state, state]))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if name not in CORRECTIONS:
        raise RebasinError(f"correction: expected one of {', '.join(CORRECTIONS)}; got {name!r}")
    check_data(name, setting.calibration)
    method = CORRECTIONS[name]
    if not method.inputs and setting.calibration is None and setting.example_inputs is None:
        raise RebasinError(f"correction={name!r} needs example_inputs, a batch of the network's inputs")
    return method.run(setting, merged, ends)


def check_data(name: str, calibration: object) -> None:
    """Refuse a correction, one of ``CORRECTIONS``, that needs calibration data where there is none.

    >>> check_data("bias-normalisation", None)
    """
    if calibration is None and CORRECTIONS[name].inputs:
        raise CalibrationError(
            f"correction={name!r} needs calibration, a collection of input batches; give calibration=batches"
        )


def _with_data(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def run(setting: CorrectionSetting, merged: State, ends: Sequence[State]) -> dict[str, Tensor]:
        return function(
            *(setting.net, merged, ends, setting.batches),
            coefficients=setting.coefficients,
            device=setting.device,
        )

    return run


def _reset(setting: CorrectionSetting, merged: State, ends: Sequence[State]) -> dict[str, Tensor]:
    del ends
    return reset_batchnorm(setting.net, merged, setting.batches, device=setting.device)


def _bias_normalisation(setting: CorrectionSetting, merged: State, ends: Sequence[State]) -> dict[str, Tensor]:
    example = setting.example_inputs
    if example is None:
        args, kwargs, _ = next(iter(batches_of(setting.net, setting.batches)))
        example = kwargs or args
    return bias_normalisation(
        setting.net, merged, ends, example, coefficients=setting.coefficients, device=setting.device
    )


def _trained(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def run(setting: CorrectionSetting, merged: State, ends: Sequence[State]) -> dict[str, Tensor]:
        return _with_data(partial(function, seed=setting.seed))(setting, merged, ends)

    return run


def _solved_and_distilled(**how: Any) -> Callable[..., dict[str, Tensor]]:
    def run(setting: CorrectionSetting, merged: State, ends: Sequence[State]) -> dict[str, Tensor]:
        solved = _with_data(least_squares)(setting, merged, ends)
        return _trained(partial(distill, **how))(setting, solved, ends)

    return run


CORRECTIONS = {
    "repair": Correction(_with_data(repair)),
    "reset-batchnorm": Correction(_reset, ends=False),
    "rescale": Correction(_with_data(rescale)),
    "reshift": Correction(_with_data(reshift)),
    "closed-form": Correction(_with_data(closed_form)),
    "bias-normalisation": Correction(_bias_normalisation, inputs=False),
    "least-squares": Correction(_with_data(least_squares)),
    "least-squares-probabilities": Correction(_with_data(partial(least_squares, goals="probabilities"))),
    "regmean": Correction(_with_data(regmean)),
    "distill": Correction(_trained(distill)),
    "least-squares+distill": Correction(_solved_and_distilled(lr=GENTLE_LR)),
    "patient-distill": Correction(_solved_and_distilled(epochs=PATIENT_EPOCHS, reread=True), rereads=True),
    "best-end": Correction(_with_data(best_end), merge=False),
    "best-end-probabilities": Correction(_with_data(partial(best_end, goals="probabilities")), merge=False),
}
