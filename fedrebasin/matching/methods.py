"""Every matching method by its name, and what each needs besides the two models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.errors import RebasinError, UsageError
from fedrebasin.matching.activation import activation_matching
from fedrebasin.matching.frank_wolfe import frank_wolfe_matching
from fedrebasin.matching.labelled import Loss
from fedrebasin.matching.many import ON_DATA
from fedrebasin.matching.result import Matching
from fedrebasin.matching.sinkhorn import sinkhorn_matching
from fedrebasin.matching.straight_through import straight_through_matching
from fedrebasin.matching.weight import weight_matching
from fedrebasin.spec import PermutationSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class MatchingSetting:
    """What a method may use: data only if it needs data."""

    spec: PermutationSpec
    net: nn.Module | None = None
    calibration: Iterable[Any] | None = None
    loss: Loss | None = None
    seed: int = 0
    device: torch.device | str | None = None


@dataclass(frozen=True)
class Method:
    """How a method is called, whether it runs the network on inputs, and whether it needs targets and a loss too.

    With ``choice`` it needs nothing, unless it is given a loss: then inputs and targets, too.
    """

    find: Callable[[MatchingSetting, State, State], Matching]
    inputs: bool = False
    targets: bool = False
    choice: bool = False

    def given(self, loss: Loss | None) -> Method:
        """The method with its choice made.

        >>> METHODS["sinkhorn"].given(None).inputs, METHODS["sinkhorn"].given(nn.functional.cross_entropy).inputs
        (False, True)
        """
        return replace(self, inputs=True, targets=True) if self.choice and loss is not None else self


def find_matching(name: str, setting: MatchingSetting, reference: State, model: State) -> Matching:
    """Match ``model`` to ``reference`` by the method that is called ``name``.

    Raises
    ------
    RebasinError
        If there is no such method, or ``setting`` lacks what it needs.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> setting = MatchingSetting(trace(net, (torch.randn(2, 4),)), net, [torch.randn(50, 4)])
    >>> find_matching("activation+weight", setting, net.state_dict(), net.state_dict()).moved_fraction
    0.0
    """
    if name not in METHODS:
        raise RebasinError(f"matching: expected one of {', '.join(METHODS)}; got {name!r}")
    method = METHODS[name].given(setting.loss)
    for needed, given, what in (
        (method.inputs, setting.net, "the network's module"),
        (method.inputs, setting.calibration, "calibration batches"),
        (method.targets, setting.loss, "loss=, a function of output and target"),
    ):
        if needed and given is None:
            raise RebasinError(f"matching={name!r} needs {what}")
    return method.find(setting, reference, model)


def _weight(setting: MatchingSetting, reference: State, model: State) -> Matching:
    return weight_matching(setting.spec, reference, model, seed=setting.seed, device=setting.device)


def _activation(setting: MatchingSetting, reference: State, model: State) -> Matching:
    assert setting.net is not None and setting.calibration is not None
    return activation_matching(
        *(setting.spec, setting.net, reference, model, setting.calibration), seed=setting.seed, device=setting.device
    )


def _activation_weight(setting: MatchingSetting, reference: State, model: State) -> Matching:
    """Weight matching from where activation matching ends: never below it."""
    start = _activation(setting, reference, model)
    found = weight_matching(setting.spec, reference, model, init=start.perms, seed=setting.seed, device=setting.device)
    return replace(
        found,
        history=(*start.history, *found.history[1:]),
        seconds=start.seconds + found.seconds,
        measures=start.measures,
    )


def _straight_through(setting: MatchingSetting, reference: State, model: State) -> Matching:
    assert setting.net is not None and setting.calibration is not None and setting.loss is not None
    return straight_through_matching(
        *(setting.spec, setting.net, reference, model, setting.calibration),
        loss=setting.loss,
        seed=setting.seed,
        device=setting.device,
    )


def _sinkhorn(setting: MatchingSetting, reference: State, model: State) -> Matching:
    """On data if there is a loss."""
    if setting.loss is None:
        return sinkhorn_matching(setting.spec, reference, model, seed=setting.seed, device=setting.device)
    return sinkhorn_matching(
        *(setting.spec, reference, model),
        net=setting.net,
        batches=setting.calibration,
        loss=setting.loss,
        seed=setting.seed,
        device=setting.device,
    )


def _frank_wolfe(setting: MatchingSetting, reference: State, model: State) -> Matching:
    return frank_wolfe_matching(setting.spec, reference, model, seed=setting.seed, device=setting.device)


METHODS = {
    "weight": Method(_weight),
    "activation": Method(_activation, inputs=True),
    "activation+weight": Method(_activation_weight, inputs=True),
    "straight-through": Method(_straight_through, inputs=True, targets=True),
    "sinkhorn": Method(_sinkhorn, choice=True),
    "frank-wolfe": Method(_frank_wolfe),
}

#: The one method whose objective many models can share.
JOINT_METHOD = "weight"
#: References that are found among the replies, by the ``match_many`` method of the same name.
JOINT_REFERENCES = ("merge-many", "medoid", "cycle-consistent", ON_DATA)


def check_joint(matching: str, reference: str) -> None:
    """Refuse a joint reference with a method that matches one pair at a time.

    >>> check_joint("weight", "merge-many")
    """
    if reference in JOINT_REFERENCES and matching != JOINT_METHOD:
        raise UsageError(
            f"reference={reference!r} is built for matching={JOINT_METHOD!r} alone; with matching={matching!r} use "
            "reference='largest', 'global' or 'auto'"
        )
