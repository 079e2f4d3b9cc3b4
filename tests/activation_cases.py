"""Networks, planted copies and data for the tests of activation matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networks
import networks_zoo
import torch
from test_matching_families import encoder
from torch import Tensor, nn

from fedrebasin import (
    PermutationSpec,
    compose,
    permute,
    random_perms,
    trace,
)

State = dict[str, Tensor]
Case = tuple[nn.Module, Any]


class Mixer(nn.Module):
    """Layers over tokens stand beside an axis of channels, which are units, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.over_tokens, self.back = nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((x + self.back(torch.relu(self.over_tokens(x.mT))).mT).mean(1))


class ByHand(nn.Module):
    """Weights that no module owns, used twice, as products of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(5, 8)), nn.Parameter(torch.zeros(8, 5))
        self.bias, self.out = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + torch.relu(torch.addmm(self.bias, x, self.up)) @ self.down
        return x @ self.out


def zoo(name: str) -> Callable[[], Case]:
    return lambda: networks_zoo.ZOO[name]()[:2]


def drawn(spec: PermutationSpec, state: State) -> State:
    """Weights of a size that keeps activations alive through many layers."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in state.items():
        draw = torch.randn(tensor.shape, generator=generator)
        scale = 0.5 if tensor.ndim < 2 else (2 / tensor[0].numel()) ** 0.5
        found[name] = tensor if name in spec.buffers else draw * scale
    return found


def noisy(spec: PermutationSpec, state: State, relative: float, seed: int = 2) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if name in spec.buffers
        else tensor + relative * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def data_for(inputs: Any, examples: int = 100, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(3)

    def one(tensor: Tensor) -> Tensor:
        shape = (examples, *tensor.shape[1:])
        if not tensor.is_floating_point():
            return torch.randint(9, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=dtype)

    if isinstance(inputs, dict):
        return [{name: one(tensor) for name, tensor in inputs.items()} for _ in range(2)]
    return [tuple(one(tensor) for tensor in inputs) for _ in range(2)]


def assert_recovered(spec: PermutationSpec, planted: State, found: State) -> None:
    for perm, order in compose(spec, planted, found).items():
        assert torch.equal(order, torch.arange(order.shape[-1]).expand(order.shape)), perm


def planted_case(make: Callable[[], Case], noise: float) -> tuple[PermutationSpec, nn.Module, State, State, State, Any]:
    torch.manual_seed(0)
    net, inputs = make()
    spec = trace(net, inputs)
    state = drawn(spec, net.state_dict())
    planted = random_perms(spec, 1)
    return spec, net, state, planted, permute(spec, planted, noisy(spec, state, noise)), data_for(inputs)


def named(make: Callable[[], Any], *shape: int) -> Callable[[], Case]:
    return lambda: (make(), (torch.zeros(shape),))


KINDS = {
    "mlp": networks.mlp,
    "vgg11": networks.vgg11,
    "encoder": encoder,
    "by-hand": named(ByHand, 2, 5),
    "mixer": named(Mixer, 2, 7, 5),
    **{
        name: zoo(name)
        for name in (
            *("multihead-kdim", "fused-norms", "lstm-projected-both-ways", "gru", "cells", "u-net", "tied"),
            *("weight-norm", "translator", "rotary-pairs", "convolutions"),
        )
    },
}
