"""Several models matched to each other: each one's problem is a pair, itself and the weighted sum of the others.

Index letters: p, q models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.coefficients import wide_type
from fedrebasin.matching.descent import improve
from fedrebasin.matching.plan import Block, plan_of
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.perms import Perms
from fedrebasin.spec import PermutationSpec
from fedrebasin.stored import described

State = Mapping[str, Tensor]


class ManyProblem:
    """``sum_{p<q} c_p c_q <P_p M_p, P_q M_q>`` over the tied parameters, raised one permutation of one model at a time.

    All else fixed it is linear in a permutation of model p, whose similarity is taken against ``sum_q c_q P_q M_q``
    without p: the sum over all models, which is kept up to date, minus p's own part.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        models: Sequence[State],
        coefficients: Sequence[float],
        *,
        labels: Sequence[str] = (),
        device: torch.device | str | None = None,
    ) -> None:
        self.spec, self.plan = spec, plan_of(spec)
        if device is None:
            device = next((tensor.device for tensor in described(models[0]).values() if not tensor.is_meta), None)
        self.models, self.device = list(models), device
        #: sum to 1, none is zero
        self.coefficients = list(coefficients)
        self.places, self.blocks = range(len(models)), self.plan.blocks
        self.pairs = [
            _with_itself(WeightProblem(spec, model, model, device=device, labels=(label, label)))
            for label, model in zip(labels or [f"models[{place}]" for place in self.places], models, strict=True)
        ]
        if len({pair.dtype for pair in self.pairs}) > 1:
            wide = [{name: x.to(wide_type(x) or x.dtype) for name, x in model.items()} for model in models]
            self.pairs = [_with_itself(WeightProblem(spec, model, model, device=device)) for model in wide]
        norms = [{name: scale**0.5 for name, scale in pair.scales.items()} for pair in self.pairs]
        for name in self.plan.names:
            mean = sum(c * norm[name] for c, norm in zip(self.coefficients, norms, strict=True))
            for pair, norm in zip(self.pairs, norms, strict=True):
                pair.scales[name] = norm[name] * mean
        self.total: dict[str, Tensor] = {}
        self.gather(self.places)

    @property
    def heaviest(self) -> int:
        """The model with the largest coefficient."""
        return self.coefficients.index(max(self.coefficients))

    @property
    def perms(self) -> list[Perms]:
        """The current permutations of every model."""
        return [dict(pair.perms) for pair in self.pairs]

    def put(self, perms: Sequence[Mapping[str, Tensor] | None]) -> None:
        """Start again from these permutations; None is the identity."""
        for pair, own in zip(self.pairs, perms, strict=True):
            pair.reset(own)
        self.gather(self.places)

    def gather(self, places: Sequence[int]) -> None:
        """Take the sum anew, over these models only, and without the rounding of many small changes."""
        self.total = {
            name: torch.stack([self.coefficients[p] * self.pairs[p].current(name) for p in places]).sum(0)
            for name in self.plan.names
        }

    def as_state(self) -> dict[str, Tensor]:
        """The sum as a state dict, with what no permutation moves from the first model."""
        first = self.models[0]
        return {
            **first,
            **{name: torch.view_as_complex(x) if first[name].is_complex() else x for name, x in self.total.items()},
        }

    def objective(self) -> float:
        """``sum_q <c_q P_q M_q, sum_{p<q} c_p P_p M_p>``, in float64: no square of one model is in it to be undone."""
        parts = []
        for name in self.plan.names:
            before: Tensor | None = None
            for c, pair in zip(self.coefficients, self.pairs, strict=True):
                current = c * pair.current(name).double()
                if before is not None:
                    parts.append(float((before * current).sum()))
                before = current if before is None else before.add_(current)
        return math.fsum(parts)

    def improve(self, place: int, block: Block) -> float:
        """Move the units of one block of one model to where they gain most; returns the gain, 0 if nothing moved."""
        pair, weight = self.pairs[place], self.coefficients[place]
        names = self.plan.tensors[block]
        for name in names:
            pair.reference[name] = torch.sub(self.total[name], pair.current(name), alpha=weight)
        pair.forget()
        gain = improve(pair, block)
        for name in names:
            if gain > 0:
                self.total[name] = torch.add(pair.reference[name], pair.current(name), alpha=weight)
            pair.reference[name] = pair.model[name]
        pair.forget()
        return weight * gain

    def sweep_towards(self, place: int, reference: State) -> None:
        """Move each block of one model once to where it is most like ``reference``; the sum is left as it was."""
        pair = self.pairs[place]
        pair.reference.update({name: reference[name] for name in self.plan.names})
        pair.forget()
        for block in self.blocks:
            improve(pair, block)
        pair.reference.update({name: pair.model[name] for name in self.plan.names})
        pair.forget()


def _with_itself(pair: WeightProblem) -> WeightProblem:
    """A pair of two times the same model, which is cast once and not for each side."""
    pair.reference.update(pair.model)
    return pair
