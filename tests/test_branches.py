"""Branches that depend on the data: the one that the example inputs take is followed, if it leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedrebasin import InvalidSpecError, PermutationSpec, TraceError, check_spec, trace

X = (torch.linspace(-1, 1, 20).view(5, 4),)
Step = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three layers, the one in the middle used by a step."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.step = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), step

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.step(self, torch.relu(self.first(x))))
        return found


def proved(net: nn.Module) -> PermutationSpec:
    return check_spec(net, trace(net, X, strict=True), X)


def _checked(net: Net, h: Tensor) -> Tensor:
    if h.isnan().any():
        raise ValueError("a NaN")
    return net.inner(h)


def _asserted(net: Net, h: Tensor) -> Tensor:
    assert bool((h >= 0).all())
    return net.inner(h)


@pytest.mark.parametrize(
    "step",
    [
        _checked,
        _asserted,
        lambda net, h: net.inner(h / 255 if h.max() > 1 else h),
        lambda net, h: net.inner(h * float(h.std())),
        lambda net, h: net.inner(h)[: int(h.abs().sum()) % 3 + 1],
    ],
)
def test_the_branch_that_the_inputs_take_is_followed_and_noted(step: Step) -> None:
    spec = proved(Net(step))
    assert spec.perm_shapes == {"first": (8,), "inner": (8,)}
    assert [note[:42] for note in spec.notes] == ["a branch of forward depends on the data, a"]


def test_a_number_on_which_no_branch_depends_is_not_noted() -> None:
    assert proved(Net(lambda net, h: net.inner(h / h.max().item()))).notes == ()


def test_a_branch_that_other_inputs_take_has_to_agree_as_well() -> None:
    net = Net(lambda net, h: net.inner(h) if h.sum() < 1e9 else net.inner(h.flip(1)))
    spec, far = trace(net, X), (1e20 * X[0],)
    assert check_spec(net, spec, X).checked
    with pytest.raises(InvalidSpecError, match=r"permuting 'first' alone changes an output"):
        check_spec(net, spec, far)
    assert check_spec(net, trace(net, far), far).perm_shapes == {"inner": (8,)}


def test_a_branch_that_random_inputs_take_has_to_agree_as_well() -> None:
    net, far = Net(lambda net, h: net.inner(h) if h.sum() > 1e9 else net.inner(h.flip(1))), (1e20 * X[0],)
    with pytest.raises(InvalidSpecError, match=r"though it is as traced: .* by another branch"):
        check_spec(net, trace(net, far), far)


def test_a_model_that_asserts_a_range_is_proved_on_the_inputs_themselves() -> None:
    class Pixels(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            assert x.min() >= 0 and x.max() <= 1, "expected pixels"
            found: Tensor = super().forward(x)
            return found

    net, pixels = Pixels(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.rand(3, 4),)
    assert check_spec(net, trace(net, pixels), pixels).perm_shapes == {"0": (8,)}
    black = (torch.zeros(3, 4),)
    with pytest.raises(InvalidSpecError, match=r"got AssertionError: expected pixels, .* let them vary"):
        check_spec(net, trace(net, black), black)


@pytest.mark.parametrize(
    "step",
    [
        lambda net, h: h if h.sum() > 0 else net.inner(h),
        lambda net, h: h if net.inner(h).sum() < 1e9 else net.inner(h),  # says which way, and is on no way itself
    ],
)
def test_a_branch_that_leaves_a_parameter_out_is_refused(step: Step) -> None:
    with pytest.raises(
        TraceError, match=r"example_inputs: a branch .* leaves out 'inner.weight' and others, .* use every parameter"
    ):
        trace(Net(step), X)


def test_what_only_training_uses_may_be_behind_a_branch() -> None:
    net = Net(lambda net, h: net.inner(h) if net.training and h.sum() < 1e9 else h)
    spec = proved(net)
    assert spec.training and len(spec.notes) == 1
    assert {axis.name for axis in spec.tied["first"]} >= {"inner.weight", "last.weight"}


class Experts(nn.Module):
    """Rows go to one of three layers each, whichever there are rows for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        chosen = self.gate(h).argmax(1)
        for place in chosen.unique().tolist():
            rows = (chosen == place).nonzero().squeeze(1)
            h = h.index_add(0, rows, self.experts[place](h[rows]))
        found: Tensor = self.last(h)
        return found


def test_experts_that_the_inputs_do_not_reach_are_found_by_the_proof() -> None:
    torch.manual_seed(0)
    net, one, many = Experts(), (torch.zeros(1, 4),), (torch.randn(64, 4),)
    with pytest.raises(InvalidSpecError, match=r"though it is as traced: .* \(to other experts"):
        check_spec(net, trace(net, one), one)
    assert check_spec(net, trace(net, many), many).perm_shapes == {"first": (8,)}
