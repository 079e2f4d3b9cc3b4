"""Networks of two widths, planted so that the right merge is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedrebasin import (
    PermutationSpec,
    trace,
)

State = dict[str, Tensor]
X = (torch.zeros(3, 5),)
IMAGE = (torch.zeros(2, 3, 16, 16),)


def mlp(first: int, second: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, first), nn.Tanh(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 4)]
    return nn.Sequential(*layers)


def spec_of(net: nn.Module, inputs: tuple[Tensor, ...] = X) -> PermutationSpec:
    return trace(net, inputs)


def widened(state: State, sources: dict[str, list[int]], shares: dict[str, list[float]]) -> State:
    """By hand: hidden unit i of layer k is a copy of ``sources[k][i]``, read by that share; -1 is a dead unit."""
    wide = {name: tensor.double() for name, tensor in state.items()}
    for layer, after in (("0", "2"), ("2", "4")):
        rows, columns, biases = [], [], []
        for source, share in zip(sources[layer], shares[layer], strict=True):
            alive = source >= 0
            rows.append(wide[f"{layer}.weight"][source] * alive)
            biases.append(wide[f"{layer}.bias"][source] * alive)
            columns.append(wide[f"{after}.weight"][:, source] * share * alive)
        wide[f"{layer}.weight"], wide[f"{layer}.bias"] = torch.stack(rows), torch.stack(biases)
        wide[f"{after}.weight"] = torch.stack(columns, 1)
    return wide


def output(state: State, x: Tensor) -> Tensor:
    net = mlp(len(state["0.bias"]), len(state["2.bias"])).double()
    net.load_state_dict(state)
    return net(x)


#: sources and shares of two hidden layers of 3 and 4 units
PLANTED = {
    "dead units": ({"0": [2, -1, 0, -1, 1], "2": [-1, 3, 1, 0, -1, 2, -1]}, {"0": [1] * 5, "2": [1] * 7}),
    "doubled units": (
        {"0": [1, 0, 1, 2], "2": [3, 2, 0, 1, 2, 0]},
        {"0": [0.5, 1, 0.5, 1], "2": [1, 0.5, 0.5, 1, 0.5, 0.5]},
    ),
    "split units": (
        {"0": [1, 1, 2, 0, 1], "2": [0, 2, 3, 1, 0]},
        {"0": [0.2, 0.5, 1, 1, 0.3], "2": [0.7, 1, 1, 1, 0.3]},
    ),
    "all of it": (
        {"0": [-1, 2, 1, 0, 2], "2": [3, 1, -1, 0, 2, 1]},
        {"0": [1, 0.4, 1, 1, 0.6], "2": [1, 0.9, 1, 1, 1, 0.1]},
    ),
}


def planted(kind: str) -> tuple[list[PermutationSpec], list[State]]:
    narrow = mlp(3, 4)
    wide = widened(narrow.state_dict(), *PLANTED[kind])
    nets = [mlp(len(wide["0.bias"]), len(wide["2.bias"])), narrow]
    return [spec_of(net) for net in nets], [wide, {k: v.double() for k, v in narrow.state_dict().items()}]


def alive(net: nn.Module, seed: int = 1) -> State:
    """Random weights, norms and statistics, so that units differ."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, tensor in net.state_dict().items():
        state[name] = tensor
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            state[name] = tensor.double() + 0.1 * drawn if tensor.ndim > 1 else 1 + 0.3 * drawn.tanh()
    return state
