"""Permuted model and permuted optimizer state train on exactly as the unpermuted would have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flower_messages import small_net
from networks import NETWORKS
from torch import Tensor, nn

from fedrebasin import PermutationSpec, permute, permute_optimizer, random_perms, trace
from fedrebasin.errors import RebasinError, SpecMismatchError

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
}
NETS = ["mlp", "conv", "grouped"]


def loss_of(net: nn.Module, inputs: tuple[Tensor, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs]
    output = net(*drawn)
    assert isinstance(output, Tensor)
    return (output - torch.randn(output.shape, generator=generator, dtype=torch.float64)).square().mean()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, inputs, step).backward()
        optimizer.step()


def split(optimizer: Make, net: nn.Module) -> torch.optim.Optimizer:
    """Two groups, in another order than the model's: indices are the optimizer's own."""
    parameters = list(net.parameters())
    return optimizer([{"params": parameters[3:]}, {"params": parameters[:3]}])


def trained(name: str, make: Make) -> tuple[nn.Module, torch.optim.Optimizer, PermutationSpec, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    net, inputs = NETWORKS[name]()
    assert isinstance(inputs, tuple)
    spec = trace(net, inputs)
    net = net.double().train()
    optimizer = split(make, net)
    train(net, optimizer, inputs, range(3))
    return net, optimizer, spec, inputs


def relabelled(
    net: nn.Module, state: dict[str, Any], make: Make, spec: PermutationSpec, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    other = copy.deepcopy(net)
    other.load_state_dict(permute(spec, random_perms(spec, seed), net.state_dict()))
    optimizer = split(make, other)
    optimizer.load_state_dict(state)
    return other, optimizer


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
def test_permuted_model_and_optimizer_train_on_as_the_unpermuted_would_have(name: str, kind: str) -> None:
    make = OPTIMIZERS[kind]
    net, optimizer, spec, inputs = trained(name, make)
    perms = random_perms(spec, 7)
    other, other_optimizer = relabelled(net, permute_optimizer(spec, perms, optimizer, net), make, spec, 7)
    train(net, optimizer, inputs, range(3, 6))
    train(other, other_optimizer, inputs, range(3, 6))
    assert apart(permute(spec, perms, net.state_dict()), other.state_dict()) < 1e-9


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw amsgrad"])
def test_with_the_optimizers_state_left_as_it_was_training_goes_another_way(kind: str) -> None:
    make = OPTIMIZERS[kind]
    net, optimizer, spec, inputs = trained("mlp", make)
    other, other_optimizer = relabelled(net, copy.deepcopy(optimizer.state_dict()), make, spec, 7)
    train(net, optimizer, inputs, range(3, 6))
    train(other, other_optimizer, inputs, range(3, 6))
    assert apart(permute(spec, random_perms(spec, 7), net.state_dict()), other.state_dict()) > 1e-3


def test_the_optimizer_is_not_changed_and_shares_no_memory_with_the_result() -> None:
    net, optimizer, spec, _ = trained("mlp", OPTIMIZERS["adam"])
    before = copy.deepcopy(optimizer.state_dict())
    state = permute_optimizer(spec, random_perms(spec, 1), optimizer, net)
    assert state["param_groups"] == before["param_groups"]
    for entries in state["state"].values():
        for value in entries.values():
            value.fill_(torch.nan)
    for index, entries in optimizer.state_dict()["state"].items():
        for entry, value in entries.items():
            assert torch.equal(value, before["state"][index][entry])


def test_state_of_parameters_that_stay_at_home_is_kept() -> None:
    net, optimizer, spec, _ = trained("mlp", OPTIMIZERS["momentum"])
    part = spec.only([name for name in spec.axes if not name.startswith("1.")])  # so that perm 1 is fixed
    state = permute_optimizer(part, random_perms(part, 1), optimizer, net)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        names[id(parameter)]
        for index, parameter in enumerate(held)
        if torch.equal(state["state"][index]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])
    }
    assert kept == {"1.weight", "1.bias", "7.bias"}


def test_an_optimizer_without_steps_has_nothing_to_permute() -> None:
    net = small_net()
    spec = trace(net, (torch.randn(4, 5),))
    assert permute_optimizer(spec, random_perms(spec, 1), torch.optim.Adam(net.parameters()), net)["state"] == {}


def test_what_does_not_fit_is_refused() -> None:
    net, inputs = small_net(norm=False), (torch.randn(4, 5),)
    spec = trace(net, inputs)
    perms = random_perms(spec, 1)
    lbfgs = torch.optim.LBFGS(net.parameters(), history_size=2)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = net(inputs[0]).square().mean()
        loss.backward()
        return loss

    lbfgs.step(closure)  # type: ignore[arg-type, no-untyped-call]
    with pytest.raises(
        RebasinError, match=r"optimizer: 0\.weight: \w+ is a .*order is not known; start this optimizer"
    ):
        permute_optimizer(spec, perms, lbfgs, net)
    other = small_net(norm=False)
    with pytest.raises(RebasinError, match=r"holds a parameter of shape \(12, 5\) that is not one of the model's"):
        permute_optimizer(spec, perms, torch.optim.SGD(other.parameters(), lr=0.1), net)
    with pytest.raises(SpecMismatchError, match="perms: expected exactly the spec's"):
        permute_optimizer(spec, {}, torch.optim.SGD(net.parameters(), lr=0.1), net)
    lone = nn.ModuleDict({"lone": nn.Linear(2, 2)})
    with pytest.raises(SpecMismatchError, match=r"none of its parameters is in the spec, e.g. 'lone.weight'"):
        permute_optimizer(spec, perms, torch.optim.SGD(lone.parameters(), lr=0.1), lone)
    wide = small_net(width=13, norm=False)
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1, momentum=0.9)
    wide(inputs[0]).square().mean().backward()
    optimizer.step()
    with pytest.raises(SpecMismatchError, match=r"model: expected '0.weight' as \(12, 5\); got \(13, 5\)"):
        permute_optimizer(spec, perms, optimizer, wide)
