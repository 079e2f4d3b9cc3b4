"""What a matching method returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fedrebasin.perms import moved_fraction


@dataclass(frozen=True)
class Matching:
    """Permutations that put a model's units into the order of a reference.

    Attributes
    ----------
    perms : dict of str to Tensor
        For :func:`fedrebasin.permute`.
    objective, objective_before : float
        The sum over tied parameters of <reference, model>, after and before; never lower after.
    history : tuple of float
        The objective after each sweep of the start that won.
    seconds : float
    """

    perms: dict[str, Tensor]
    objective: float
    objective_before: float
    history: tuple[float, ...] = field(default=(), repr=False)
    seconds: float = 0.0

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
    """

    perms: list[dict[str, Tensor]]
    objective: float
    objective_before: float
    history: tuple[float, ...] = field(default=(), repr=False)
    seconds: float = 0.0

    @property
    def moved_fraction(self) -> float:
        """Share of units of all models that change place, in [0, 1]."""
        return sum(moved_fraction(perms) for perms in self.perms) / max(1, len(self.perms))
