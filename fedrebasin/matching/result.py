"""What a matching method returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedrebasin.matching.numbers import as_real
from fedrebasin.perms import moved_fraction
from fedrebasin.spec import PermutationSpec


@dataclass(frozen=True)
class Matching:
    """Permutations that put a model's units into the order of a reference.

    Attributes
    ----------
    perms : dict of str to Tensor
        For :func:`fedrebasin.permute`.
    objective, objective_before : float
        The sum over tied parameters of <reference, model>, after and before; never lower after where a method
        maximises it.
    history : tuple of float
        The objective after each sweep of the start that won.
    seconds : float
    measures : dict of str to float
        What a method that uses data maximised or minimised, after and before: ``"correlation"`` and
        ``"correlation-before"``, or ``"loss"`` and ``"loss-before"``.
    """

    perms: dict[str, Tensor]
    objective: float
    objective_before: float
    history: tuple[float, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def moved_fraction(self) -> float:
        """Share of units that change place, in [0, 1]."""
        return moved_fraction(self.perms)


@dataclass(frozen=True)
class ManyMatching:
    """Permutations that put several models into one common order; the heaviest model keeps its own.

    Attributes
    ----------
    perms : list of dict of str to Tensor
        One for each model.
    objective, objective_before : float
        The sum over pairs of models of their coefficients' product times <model, model>.
    history : tuple of float
        The objective on the way there, never falling but for ``"star"``, ``"medoid"`` and methods on data.
    seconds : float
    measures : dict of str to float
        As for :class:`Matching`.
    """

    perms: list[dict[str, Tensor]]
    objective: float
    objective_before: float
    history: tuple[float, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def moved_fraction(self) -> float:
        """Share of units of all models that change place, in [0, 1]."""
        return sum(moved_fraction(perms) for perms in self.perms) / max(1, len(self.perms))


def inner_product(spec: PermutationSpec, reference: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> float:
    """The matching objective: the sum over tied parameters of <reference, model>, in float64.

    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 2),)})
    >>> inner_product(spec, {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
    11.0
    """
    tied = {axis.name for axes in spec.tied.values() for axis in axes} - set(spec.buffers)
    return math.fsum(
        float(torch.dot(*(as_real(side[name]).reshape(-1).double().cpu() for side in (reference, model))))
        for name in spec.axes
        if name in tied
    )
