"""A network under a loss on labelled data, whose weights are put in from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedrebasin.batches import Batches, mean_loss
from fedrebasin.coefficients import single
from fedrebasin.corrections.working import load, working_copy
from fedrebasin.errors import RebasinError
from fedrebasin.matching.numbers import refuse_complex
from fedrebasin.spec import PermutationSpec

Loss = Callable[[Any, Any], Tensor]
State = Mapping[str, Tensor]


class LabelledNet:
    """A working copy of ``net``, in float32 or better and in evaluation mode, with its batches and loss."""

    def __init__(
        self,
        spec: PermutationSpec,
        net: nn.Module,
        state: State,
        batches: Iterable[Any],
        *,
        loss: Loss,
        device: torch.device | str | None,
    ) -> None:
        refuse_complex(spec.parameters, state, "net", "where a loss is followed", "use weight_matching")
        self.where = device if device is not None else next(iter(state.values()), torch.zeros(0, device="cpu")).device
        self.batches = Batches(batches, inputs=spec.inputs, name="batches", device=self.where)
        self.spec, self._loss = spec, loss
        self._net = working_copy(net, state, self.where)
        for parameter in self._net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def prepared(self, state: State) -> dict[str, Tensor]:
        """A copy of a state on the network's device, narrow types widened."""
        return {name: single(tensor.detach().to(self.where, copy=True)) for name, tensor in state.items()}

    def put(self, state: State) -> None:
        """Set the network's weights."""
        load(self._net, state)

    def loss_of(self, args: Any, kwargs: Any, target: Any, state: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of one batch, at ``state`` if given: a scalar."""
        output = self._net(*args, **kwargs) if state is None else functional_call(self._net, state, args, kwargs)
        value = self._loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RebasinError(f"loss: expected a scalar tensor from loss(output, target); got {got}")
        return value

    @torch.enable_grad()
    def gradients(self, args: Any, kwargs: Any, target: Any) -> tuple[bool, dict[str, Tensor]]:
        """Whether the loss of a batch is finite, and its gradient in every parameter that has one."""
        self._net.zero_grad(set_to_none=True)
        value = self.loss_of(args, kwargs, target)
        torch.autograd.backward(value)
        own = self._net.state_dict(keep_vars=True)
        found = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
        return bool(value.isfinite()), found

    def mean(self) -> float:
        """The mean loss over all examples."""
        return mean_loss(self.batches, self.loss_of)
