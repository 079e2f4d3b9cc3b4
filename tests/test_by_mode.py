"""What a model gives in training mode alone is as fixed as what it gives in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedrebasin import check_spec, permute, random_perms, trace
from fedrebasin.by_mode import differs_in_training
from fedrebasin.errors import InvalidSpecError
from fedrebasin.layout import Free

X = (torch.randn(6, 4),)


class Net(nn.Module):
    """A hidden layer, a head of five, and what ``give`` makes of the head's numbers."""

    def __init__(self, give: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.trunk, self.head, self.give = nn.Linear(4, 8), nn.Linear(8, 5), give
        if give is _expectation:
            self.bins = nn.Parameter(torch.arange(5.0), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return self.give(self, self.head(self.trunk(x).relu()))


def _expectation(net: Net, logits: Tensor) -> Tensor:
    return logits if net.training else logits.softmax(-1) @ net.bins


def _mode(module: nn.Module) -> bool:
    return module.training


def _by_helper(net: Net, logits: Tensor) -> Tensor:
    return logits if _mode(net) else logits.logsumexp(-1)


GIVES: dict[str, Callable[[Net, Tensor], Any]] = {
    "energy": lambda net, logits: logits if net.training else logits.logsumexp(-1),
    "expectation": _expectation,
    "one more": lambda net, logits: (logits.sum(-1), logits) if net.training else (logits.sum(-1),),
    "same shape": lambda net, logits: logits.cumsum(-1).mean(-1) if net.training else logits.mean(-1),
    "by a helper": _by_helper,
    "by its name": lambda net, logits: logits if getattr(net, "training") else logits.mean(-1),  # noqa: B009
}


@pytest.mark.parametrize("give", GIVES.values(), ids=GIVES)
def test_units_that_training_alone_returns_stay_and_both_modes_give_the_same_after_a_permutation(
    give: Callable[[Net, Tensor], Any],
) -> None:
    net = Net(give)
    spec = check_spec(net, trace(net, X, strict=True), X)
    assert spec.perm_shapes == {"trunk": (8,)} and spec.training and spec.notes == ()
    net, x = net.double(), X[0].double()
    moved = permute(spec, random_perms(spec, 1), net.state_dict())
    for mode in (True, False):
        net.train(mode)
        torch.testing.assert_close(functional_call(net, moved, (x,)), net(x))


def test_a_spec_that_moves_what_training_returns_is_refused() -> None:
    net = Net(GIVES["energy"])
    right = trace(net, X)
    head = Free("head", 5)
    axes = {**right.axes, "head.weight": (head, right.axes["head.weight"][1]), "head.bias": (head,)}
    wrong = type(right)(axes=axes, buffers=right.buffers, inputs=right.inputs, training=True)
    with pytest.raises(InvalidSpecError):
        check_spec(net, wrong, X)


SAME: dict[str, Callable[[Net, Tensor], Any]] = {
    "dropout": lambda net, logits: F.dropout(logits, 0.5, net.training).sum(-1),
    "stochastic depth": lambda net, logits: (
        logits.sum(-1) + (logits * torch.empty(6, 1).bernoulli_(0.3) / 0.3 if net.training else logits).sum(-1)
    ),
    "nothing": lambda _, logits: logits.sum(-1),
    "noise": lambda net, logits: (logits + torch.randn_like(logits) if net.training else logits).sum(-1),
    "noise about one": lambda net, logits: (
        logits * torch.empty_like(logits).uniform_(0.9, 1.1) if net.training else logits
    ).sum(-1),
    "noise of a distribution": lambda net, logits: (
        torch.distributions.Normal(logits, torch.ones_like(logits), validate_args=False).rsample()
        if net.training
        else logits
    ).sum(-1),
    "noise in place": lambda net, logits: (
        logits + torch.empty_like(logits).normal_(0, 0.1) + torch.empty(5).normal_() if net.training else logits
    ).sum(-1),
    "uniform noise": lambda net, logits: (
        logits + torch.rand(6, 5) - torch.empty(5).uniform_() if net.training else logits
    ).sum(-1),
    "layers left out": lambda net, logits: (
        logits if net.training and torch.rand([]) < 0.2 else logits + logits.sin()
    ).sum(-1),
}


@pytest.mark.parametrize("give", SAME.values(), ids=SAME)
def test_dropping_alone_is_no_difference_and_costs_no_graph(give: Callable[[Net, Tensor], Any]) -> None:
    net = Net(give)
    assert not differs_in_training(net, X, {})
    spec = check_spec(net, trace(net, X), X)
    assert spec.perm_shapes == {"trunk": (8,), "head": (5,)} and not spec.training


class BatchNormAct(nn.BatchNorm1d):
    """With its activation, and a forward pass of its own, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, 0.1, self.eps).relu()


class OwnDropPath(nn.Module):
    """Stochastic depth as in transformers: by rounding, and what is kept is larger."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 0.9 * (0.9 + torch.rand(len(x), 1)).floor() if self.training else x


@pytest.mark.parametrize("layer", [BatchNormAct(8), OwnDropPath()])
def test_layers_that_mix_or_drop_as_usual_are_no_difference(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 5))
    assert not differs_in_training(net, X, {})
    spec = check_spec(net, trace(net, X), X)
    assert spec.perm_shapes == {"0": (8,)} and not spec.training


def test_a_network_that_has_dropout_in_its_name_may_give_something_else() -> None:
    class NetWithDropout(Net):
        pass

    assert differs_in_training(NetWithDropout(GIVES["energy"]), X, {})


def test_a_training_mode_that_cannot_be_exported_is_noted_and_one_that_wants_other_inputs_is_not() -> None:
    def unclear(net: Net, logits: Tensor) -> Tensor:
        return logits * float(logits.detach().numpy().sum()) if net.training else logits.logsumexp(-1)

    def other(net: Net, logits: Tensor) -> Tensor:
        if net.training:
            raise ValueError("targets")
        return logits.logsumexp(-1)

    (note,) = trace(Net(unclear), X).notes
    assert note.startswith("forward gives something else in training mode, and cannot be exported there (")
    assert trace(Net(other), X).notes == ()


def test_looking_leaves_the_model_as_it_was() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(GIVES["energy"])
            self.register_buffer("seen", torch.zeros(()))
            self.calls: list[int] = []

        def forward(self, x: Tensor) -> Any:
            if self.training:
                self.seen += 1
            self.calls.append(1)
            return super().forward(x)

    net = Counting().train()
    state = torch.get_rng_state()
    assert differs_in_training(net, X, {})
    assert net.training and net.seen == 0 and net.calls == []
    assert torch.equal(torch.get_rng_state(), state)
