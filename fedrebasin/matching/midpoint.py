"""The network between a reference and a permuted model, and its loss on labelled data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from fedrebasin.batches import Batches
from fedrebasin.corrections.working import load, working_copy
from fedrebasin.errors import CalibrationError, RebasinError
from fedrebasin.matching.grids import Grid, grids_of, soft_permute
from fedrebasin.matching.relaxed import Relaxed
from fedrebasin.matching.result import Matching, inner_product
from fedrebasin.perms import Perms
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec

_STATISTICS = ("weight", "bias", "running_mean", "running_var")

Loss = Callable[[Any, Any], Tensor]
State = Mapping[str, Tensor]


class Midpoint:
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
        where = device if device is not None else next(iter(reference.values()), torch.zeros(0)).device
        self.batches = Batches(batches, inputs=spec.inputs, name="batches", device=where)
        self.reference, self._model = _prepare(reference, where), _prepare(model, where)
        #: what relaxed permutations are like: their type and device
        wide = any(tensor.dtype == torch.float64 for tensor in self.reference.values())
        self.like = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=where)
        self.spec, self._loss, self.lam = spec, loss, lam
        self._net = working_copy(net, reference, where)
        for parameter in self._net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def _put(self, perms: Perms) -> None:
        moved = permute(self.spec, perms, self._model)
        between = {
            name: torch.lerp(tensor, moved[name], self.lam) if tensor.is_floating_point() else tensor
            for name, tensor in self.reference.items()
        }
        load(self._net, between)

    def _loss_of(self, args: Any, kwargs: Any, target: Any, state: dict[str, Tensor] | None = None) -> Tensor:
        if target is None:
            raise CalibrationError("batches: expected (input, target) pairs; got a batch without a target")
        output = self._net(*args, **kwargs) if state is None else functional_call(self._net, state, args, kwargs)
        value = self._loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RebasinError(f"loss: expected a scalar tensor from loss(output, target); got {got}")
        return value

    def set_gradients(self, shadow: State, perms: Perms, args: Any, kwargs: Any, target: Any) -> bool:
        """Put the gradient at the midpoint where the shadow's is read; False if the loss is not finite."""
        self._put(perms)
        self._net.zero_grad(set_to_none=True)
        value = self._loss_of(args, kwargs, target)
        value.backward()  # type: ignore[no-untyped-call]
        own = self._net.state_dict(keep_vars=True)
        for name, tensor in shadow.items():
            gradient = own[name].grad
            tensor.grad = None if gradient is None else gradient.to(tensor.dtype)
        return bool(value.isfinite())

    def soft_loss(self, relaxed: Relaxed, lam: float, args: Any, kwargs: Any, target: Any) -> Tensor:
        """The loss of a batch after relaxed permutations, at any ``lam``; differentiable in them."""
        between = {}
        for name, tensor in [*self._net.named_parameters(), *self._net.named_buffers()]:
            if name in self.reference and tensor.is_floating_point():
                moved = self._model[name]
                if name in self._grids:
                    moved = soft_permute(self._grids[name], relaxed, moved.to(self.like))
                between[name] = torch.lerp(self.reference[name], moved.to(self.reference[name]), lam).to(tensor)
        return self._loss_of(args, kwargs, target, _folded(self._net, between))

    @cached_property
    def _grids(self) -> dict[str, list[Grid]]:
        tied = dict.fromkeys(axis.name for axes in self.spec.tied.values() for axis in axes)
        return {name: grids_of(self.spec.axes[name]) for name in tied}

    @torch.no_grad()
    def mean_loss(self, perms: Perms) -> float:
        """The mean loss over all examples."""
        self._put(perms)
        total, count = 0.0, 0
        for args, kwargs, target in self.batches:
            size = len(target) if isinstance(target, Tensor) and target.ndim else 1
            total += float(self._loss_of(args, kwargs, target)) * size
            count += size
        return total / count


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


def _prepare(state: State, where: torch.device | str) -> dict[str, Tensor]:
    narrow = (torch.float16, torch.bfloat16)
    return {
        name: tensor.detach().to(where, torch.float32 if tensor.dtype in narrow else tensor.dtype)
        for name, tensor in state.items()
    }
