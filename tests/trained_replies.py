"""Small models trained from one start or apart, for tests of rounds: what replies are in truth."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from flower_messages import State, small_net
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedrebasin.strategies import Rebasin

WIDTH = 24


@cache
def data() -> tuple[Tensor, Tensor]:
    """Five features, three classes by the nearest of three centres."""
    generator = torch.Generator().manual_seed(0)
    x, centres = torch.randn(600, 5, generator=generator), torch.randn(3, 5, generator=generator)
    return x, torch.cdist(x, centres).argmin(1)


def train(net: nn.Module, seed: int, epochs: int = 5) -> State:
    x, y = data()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.train().parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@cache
def fresh() -> nn.Module:
    return small_net(WIDTH, norm=False)


@cache
def trained(kind: str) -> list[State]:
    if kind == "apart":
        return [train(small_net(WIDTH, norm=False, seed=100 + node), node) for node in range(3)]
    return [train(copy.deepcopy(fresh()), node) for node in range(3)]


def strategy_around(inner: Strategy, **options: Any) -> Rebasin:
    return Rebasin(inner, model=lambda: small_net(WIDTH, norm=False), example_inputs=(torch.randn(4, 5),), **options)


def accuracy(state: State) -> float:
    x, y = data()
    net = small_net(WIDTH, norm=False).eval()
    net.load_state_dict(state)
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def nearest(a: State, b: State) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
