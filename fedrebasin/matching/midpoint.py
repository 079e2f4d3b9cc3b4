"""The network between a reference and a permuted model, and its loss on labelled data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedrebasin.errors import CalibrationError
from fedrebasin.matching.grids import Grid, grids_of, soft_permute
from fedrebasin.matching.labelled import LabelledNet, Loss, State
from fedrebasin.matching.relaxed import Relaxed
from fedrebasin.matching.result import Matching, inner_product
from fedrebasin.perms import Perms
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


class Midpoint(LabelledNet):
    """The network between the reference and the permuted model, in float32 or better."""

    def __init__(
        self,
        spec: PermutationSpec,
        net: nn.Module,
        reference: State,
        model: State,
        batches: Iterable[Any],
        *,
        loss: Loss,
        lam: float,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(spec, net, reference, batches, loss=loss, device=device)
        self.reference, self._model, self.lam = self.prepared(reference), self.prepared(model), lam
        #: what relaxed permutations are like: their type and device
        wide = any(tensor.dtype == torch.float64 for tensor in self.reference.values())
        self.like = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=self.where)

    def _put(self, perms: Perms) -> None:
        moved = permute(self.spec, perms, self._model)
        between = {
            name: torch.lerp(tensor, moved[name].to(tensor), self.lam) if tensor.is_floating_point() else tensor
            for name, tensor in self.reference.items()
        }
        self.put(between)

    def set_gradients(self, shadow: State, perms: Perms, args: Any, kwargs: Any, target: Any) -> bool:
        """Put the gradient at the midpoint where the shadow's is read; False if the loss is not finite."""
        self._put(perms)
        finite, own = self.gradients(args, kwargs, target)
        for name, tensor in shadow.items():
            tensor.grad = own[name].to(tensor.dtype) if name in own else None
        return finite

    def soft_loss(self, relaxed: Relaxed, lam: float, args: Any, kwargs: Any, target: Any) -> Tensor:
        """The loss of a batch after relaxed permutations, at any ``lam``; differentiable in them."""
        between = {}
        for name, tensor in [*self._net.named_parameters(), *self._net.named_buffers()]:
            if name in self.reference and tensor.is_floating_point():
                moved = self._model[name]
                if name in self._grids:
                    moved = soft_permute(self._grids[name], relaxed, moved.to(self.like))
                between[name] = torch.lerp(self.reference[name], moved.to(self.reference[name]), lam).to(tensor)
        return self.loss_of(args, kwargs, target, _folded(self._net, between))

    @cached_property
    def _grids(self) -> dict[str, list[Grid]]:
        tied = dict.fromkeys(axis.name for axes in self.spec.tied.values() for axis in axes)
        return {name: grids_of(self.spec.axes[name]) for name in tied}

    def mean_loss(self, perms: Perms) -> float:
        """The mean loss over all examples."""
        self._put(perms)
        return self.mean()


def _folded(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Running statistics as part of the scale and shift: torch has no derivative in them."""
    result = dict(state)
    for prefix, module in net.named_modules():
        if not isinstance(module, _NormBase) or module.running_mean is None:
            continue
        weight, bias, mean, var = (f"{prefix}.{name}".lstrip(".") for name in _STATISTICS)
        if weight in state:
            gain = state[weight] * (state[var] + module.eps).rsqrt()
            result[weight], result[bias] = gain, state[bias] - state[mean] * gain
            result[mean], result[var] = torch.zeros_like(state[mean]), torch.full_like(state[var], 1 - module.eps)
        else:  # nothing to fold them into: what they take part in stays, their derivative is left out
            result[mean], result[var] = state[mean].detach(), state[var].detach()
    return result


def lowest_loss_matching(
    midpoint: Midpoint, reference: State, model: State, start: Perms, candidates: Iterable[Perms], started: float
) -> Matching:
    """The candidate whose mean loss is lowest, or ``start``.

    Raises
    ------
    CalibrationError
        If the loss at ``start`` is not finite.
    """
    best, first = start, midpoint.mean_loss(start)
    lowest = first
    if not math.isfinite(first):
        raise CalibrationError(f"batches: the loss at the start is {first}; check the models, the inputs and the loss")
    for perms in candidates:
        found = midpoint.mean_loss(perms)
        if found < lowest:
            best, lowest = perms, found
    before = inner_product(midpoint.spec, reference, model)
    objective = inner_product(midpoint.spec, reference, permute(midpoint.spec, best, model))
    seconds = time.perf_counter() - started
    return Matching(best, objective, before, (before, objective), seconds, {"loss": lowest, "loss-before": first})
