"""Populations of small MLPs for ``learned.py``, made on the spot: all are trained side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin.simulations.data import load_dataset

State = dict[str, Tensor]
WIDTH = 32


class Sine(nn.Module):
    """The activation of a network that is a function."""

    def forward(self, x: Tensor) -> Tensor:
        """The sine of each entry."""
        return x.sin()


@dataclass(frozen=True)
class Population:
    """Trained networks, one behind the other in every tensor, two neighbours a pair, and each pair's test data."""

    net: nn.Module
    states: State
    test: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]

    def one(self, place: int) -> State:
        """One network's state dict."""
        return {name: tensor[place].clone() for name, tensor in self.states.items()}


def network(inputs: int, outputs: int, activation: Callable[[], nn.Module]) -> nn.Module:
    """Two hidden layers."""
    sizes = [nn.Linear(inputs, WIDTH), activation(), nn.Linear(WIDTH, WIDTH), activation(), nn.Linear(WIDTH, outputs)]
    return nn.Sequential(*sizes)


def trained(
    make: Callable[[], nn.Module],
    count: int,
    steps: int,
    loss: Callable[[State, int], Tensor],
    seed: int,
) -> tuple[nn.Module, State]:
    """Many networks from initialisations of their own, trained side by side; ``loss`` is their sum."""
    torch.manual_seed(seed)
    nets = [make() for _ in range(count)]
    states = {
        name: torch.stack([net.state_dict()[name] for net in nets]).requires_grad_() for name in nets[0].state_dict()
    }
    optimizer = torch.optim.Adam(states.values(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss(states, step))
        optimizer.step()
    return nets[0], {name: tensor.detach() for name, tensor in states.items()}


def outputs_of(states: State, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs of all networks: ``(networks, examples, outputs)``."""
    for layer in ("0", "2", "4"):
        x = x @ states[f"{layer}.weight"].transpose(-1, -2) + states[f"{layer}.bias"].unsqueeze(-2)
        x = x if layer == "4" else activation(x)
    return x


def digits(count: int, seed: int) -> Population:
    """Classifiers of digits."""
    data = load_dataset("digits", None)
    images, tests = (data.normalise(part).flatten(1) for part in (data.train_images, data.test_images))

    def loss(states: State, step: int) -> Tensor:
        rows = torch.randint(len(images), (count, 64), generator=torch.Generator().manual_seed(step))
        found = outputs_of(states, images[rows], torch.relu)
        return F.cross_entropy(found.flatten(0, 1), data.train_labels[rows].flatten(), reduction="sum") / 64

    net, states = trained(lambda: network(images.shape[1], data.classes, nn.ReLU), count, 400, loss, seed)
    return Population(net, states, lambda pair: (tests, data.test_labels), F.cross_entropy)


def sines(count: int, seed: int) -> Population:
    """Functions: sine waves of many frequencies and phases, two networks each."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.rand(count // 2, 2, generator=generator).repeat_interleave(2, 0)
    x = torch.linspace(-1, 1, 128).unsqueeze(1)
    targets = (3 * (1 + 2 * waves[:, :1].unsqueeze(2)) * x + 6 * waves[:, 1:].unsqueeze(2)).sin()

    def loss(states: State, step: int) -> Tensor:
        return (outputs_of(states, x, torch.sin) - targets).square().mean((1, 2)).sum()

    net, states = trained(lambda: network(1, 1, Sine), count, 600, loss, seed)
    return Population(net, states, lambda pair: (x, targets[2 * pair]), F.mse_loss)
