"""Which permutations ``fedrebasin merge`` applies: all models to one of them, or to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedrebasin.errors import UsageError
from fedrebasin.matching.many import MANY_METHODS, ON_DATA, match_many
from fedrebasin.matching.methods import JOINT_METHOD, METHODS, MatchingSetting, find_matching
from fedrebasin.perms import Perms, identity_perms
from fedrebasin.spec import PermutationSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How models are matched: ``joint`` names a method of :func:`match_many`, or is "" for pairs with a reference."""

    matching: str
    joint: str
    reference: int

    @property
    def method(self) -> str:
        """For people and the provenance."""
        return self.joint or "reference"


@dataclass(frozen=True)
class Found:
    """Permutations for each model, and the objective before and after them.

    Of pairs with a reference it is the sum of the pairs' objectives, of a joint method that method's own.
    """

    perms: list[Perms]
    objective: float
    objective_before: float
    measures: Mapping[str, float]


def plan_matching(
    paths: Sequence[Path], weights: Sequence[float], *, matching: str, method: str, reference: Path | None
) -> Plan:
    """Decide between pairs and a joint method.

    Three models or more go by the first joint method where nothing else is asked for; the heaviest model keeps its
    order.

    Raises
    ------
    UsageError
        If a method is unknown, or two options contradict each other.

    Examples
    --------
    >>> plan_matching([Path("a"), Path("b")], [0.5, 0.5], matching="weight", method="", reference=None)
    Plan(matching='weight', joint='', reference=0)
    """
    if matching not in METHODS:
        raise UsageError(f"--matching: expected one of {', '.join(METHODS)}; got {matching!r}")
    if method and method not in MANY_METHODS:
        raise UsageError(f"--method: expected one of {', '.join(MANY_METHODS)}; got {method!r}")
    if method and reference is not None:
        raise UsageError("--method: aligns all models to each other; leave --reference out, or this")
    if method and matching != JOINT_METHOD:
        raise UsageError(f"--method: needs --matching {JOINT_METHOD}; with --matching {matching} give a --reference")
    heaviest = list(weights).index(max(weights))
    if reference is None:
        joint = method or (next(iter(MANY_METHODS)) if len(paths) > 2 and matching == JOINT_METHOD else "")
        return Plan(matching, joint, heaviest)
    places = [place for place, path in enumerate(paths) if path.resolve() == reference.resolve()]
    if not places:
        raise UsageError(f"--reference: expected one of the files that are merged; got {reference}")
    return Plan(matching, "", places[0])


def needs_data(plan: Plan, *, labelled: bool) -> bool:
    """Whether the matching runs the network."""
    if plan.joint:
        return labelled and plan.joint == ON_DATA
    method = METHODS[plan.matching]
    return method.inputs or (method.choice and labelled)


def match(
    plan: Plan,
    spec: PermutationSpec,
    states: Sequence[State],
    weights: Sequence[float],
    *,
    net: nn.Module | None,
    calibration: Sequence[Any] | None,
    labelled: bool,
    seed: int,
) -> Found:
    """Find the permutations."""
    loss = nn.functional.cross_entropy if labelled else None
    if plan.joint:
        runs = needs_data(plan, labelled=labelled)
        data: dict[str, Any] = {"net": net, "batches": calibration, "loss": loss} if runs else {}
        many = match_many(spec, states, coefficients=weights, method=plan.joint, seed=seed, **data)
        return Found(many.perms, many.objective, many.objective_before, many.measures)
    setting = MatchingSetting(spec, net, calibration, loss, seed)
    perms: list[Perms] = []
    measures: dict[str, float] = {}
    objective = before = 0.0
    for place, state in enumerate(states):
        if place == plan.reference:
            perms.append(identity_perms(spec))
            continue
        found = find_matching(plan.matching, setting, states[plan.reference], state)
        perms.append(found.perms)
        objective, before = objective + found.objective, before + found.objective_before
        for name, value in found.measures.items():
            measures[name] = measures.get(name, 0.0) + value / (len(states) - 1)
    return Found(perms, objective, before, measures)
