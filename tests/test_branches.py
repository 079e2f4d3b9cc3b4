"""Branches that depend on the data: every way is followed, or that of the example inputs, if it leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch_version import TORCH

from fedrebasin import InvalidSpecError, PermutationSpec, TraceError, check_spec, trace

X = (torch.linspace(-1, 1, 20).view(5, 4),)
Step = Callable[["Net", Tensor], Tensor]
numbers = pytest.mark.skipif(TORCH < (2, 14), reason="torch takes wrong numbers out of tensors")


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


def _settled(net: Net, h: Tensor) -> Tensor:
    for _ in range(5):
        before, h = h, torch.relu(net.inner(h))
        if torch.allclose(before, h):
            break
    return h


def _grown(net: Net, h: Tensor) -> Tensor:
    while h.abs().sum() < 1e3:  # told true, it does not end
        h = 2 * h + 1
    return net.inner(h)


def _parted(net: Net, h: Tensor) -> Tensor:
    for _ in range(2):  # twice 32 ways
        h = net.inner(h) if h.sum() > 0 else h
        h = 1 + h if h.max() > 0 else h
        h = 2 + h if h.min() > 0 else h
        h = 2 * h if h.mean() > 0 else h
        h = 3 * h if h.std() > 0 else h
    return h


@pytest.mark.parametrize(
    ("step", "perms"),
    [
        (_checked, {"first", "inner"}),
        (_asserted, {"first", "inner"}),
        (lambda net, h: net.inner(h / 255 if h.max() > 1 else h), {"first", "inner"}),
        (lambda net, h: net.inner(h) if torch.equal(h, h.abs()) else net.inner(-h), {"first", "inner"}),
        (lambda net, h: h if h.sum() > 0 else net.inner(h), {"first"}),
        (lambda net, h: h if (h > 1).any().item() else net.inner(h), {"first"}),
        (lambda net, h: 2 * h if net.inner(h).sum() < 1e9 else h, {"first", "inner"}),
        (lambda net, h: net.inner(h) if h.sum() < 1e9 else net.inner(h.flip(1)), {"inner"}),
    ],
)
def test_every_way_that_truths_part_is_followed(step: Step, perms: set[str]) -> None:
    spec = proved(Net(step))
    assert spec.perm_shapes.keys() == perms
    assert spec.notes == ()


def test_the_outputs_of_an_early_exit_keep_their_order() -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, h: torch.relu(net.inner(h)))
            self.exit = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            early: Tensor = self.exit(torch.relu(self.first(x)))
            return early if early.softmax(1).max() > 0.9 else super().forward(x)

    spec = proved(Early())
    assert spec.perm_shapes == {"first": (8,), "inner": (8,)}
    assert {axis.name for axis in spec.tied["first"]} == {"first.weight", "first.bias", "inner.weight", "exit.weight"}


@pytest.mark.parametrize(
    "step",
    [
        lambda net, h: net.inner(h * float(h.std())),
        lambda net, h: net.inner(h)[: int(h.abs().sum()) % 3 + 1],
        lambda net, h: net.inner(h) if float(h.sum()) > 0 else 2 * net.inner(h),
        pytest.param(
            lambda net, h: net.inner(h) if h.sum().item() > 0 else 2 * net.inner(h),
            marks=numbers,
        ),
        _settled,
        _grown,
        _parted,
    ],
)
def test_where_there_may_be_more_ways_a_note_says_so(step: Step) -> None:
    (note,) = proved(Net(step)).notes
    assert "not every way was followed" in note


def test_layers_that_ask_alike_are_told_alike() -> None:
    class Layer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("ready", torch.tensor(False))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.ready else super().forward(2 * x)

    net = Net(lambda net, h: net.layers(net.inner(h)))
    net.layers = nn.Sequential(*(Layer() for _ in range(6)))  # 64 ways
    net.spare = nn.Parameter(torch.ones(8))
    spec = proved(net)
    assert len(spec.perm_shapes) == 8
    assert [note.split(" ")[0] for note in spec.notes] == ["forward", "the"]


def test_a_number_on_which_no_branch_depends_is_not_noted() -> None:
    assert proved(Net(lambda net, h: net.inner(h / h.max().item()))).notes == ()


@numbers
def test_a_way_that_was_not_followed_has_to_agree_where_the_proof_takes_it() -> None:
    net = Net(lambda net, h: net.inner(h) if float(h.sum()) < 1e9 else net.inner(h.flip(1)))
    spec, far = trace(net, X), (1e20 * X[0],)
    assert check_spec(net, spec, X).checked
    with pytest.raises(InvalidSpecError, match=r"permuting 'first' alone changes an output"):
        check_spec(net, spec, far)
    assert check_spec(net, trace(net, far), far).perm_shapes == {"inner": (8,)}


def test_outputs_of_another_shape_are_a_change() -> None:
    spec = trace(Net(lambda net, h: net.inner(h)), X)
    net = Net(lambda net, h: net.inner(h)[: 1 + int((h[:, 0] > h[:, 1]).sum())])
    with pytest.raises(InvalidSpecError, match=r"permuting 'first' alone changes an output by inf"):
        check_spec(net, spec, X)


@numbers
def test_random_inputs_may_take_a_way_that_was_not_followed() -> None:
    far = (1e20 * X[0],)
    net = Net(lambda net, h: net.inner(h) if float(h.sum()) > 1e9 else net.inner(h.flip(1)))
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


@numbers
@pytest.mark.parametrize(
    "step",
    [
        lambda net, h: h if float(h.sum()) > 0 else net.inner(h),
        lambda net, h: h if float(net.inner(h).sum()) < 1e9 else net.inner(h),  # which chooses, and is on no way itself
    ],
)
def test_a_way_that_leaves_a_parameter_out_is_refused(step: Step) -> None:
    with pytest.raises(
        TraceError,
        match=r"example_inputs: the way through Net.forward .* leave out 'inner.bias' and others, .* use every",
    ):
        trace(Net(step), X)


def test_on_the_meta_device_numbers_show_no_way() -> None:
    net = Net(lambda net, h: net.inner(h) if float(h.sum()) > 0 else h).to("meta")
    with pytest.raises(TraceError, match=r"depends on numbers, and the meta device has none"):
        trace(net, (X[0].to("meta"),))
    net.step = lambda net, h: net.inner(h) if h.sum() > 0 else h
    assert trace(net, (X[0].to("meta"),)).perm_shapes == {"first": (8,)}


def test_a_model_that_ends_every_way_in_an_error_is_refused_with_it() -> None:
    def wrong(net: Net, h: Tensor) -> Tensor:
        if h.sum() > 0:
            raise ValueError("large")
        raise ValueError("small")

    with pytest.raises(TraceError, match=r"cannot export Net .*ValueError: small"):
        trace(Net(wrong), X)


def test_what_only_training_uses_may_be_behind_a_branch() -> None:
    net = Net(lambda net, h: net.inner(h) if net.training and h.sum() < 1e9 else h)
    spec = proved(net)
    assert spec.training and spec.notes == ()
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


@numbers
def test_experts_that_the_inputs_do_not_reach_are_found_by_the_proof() -> None:
    torch.manual_seed(0)
    net, one, many = Experts(), (torch.zeros(20, 4),), (torch.randn(64, 4),)
    with pytest.raises(InvalidSpecError, match=r"though it is as traced: .* \(to other experts"):
        check_spec(net, trace(net, one), one)
    assert check_spec(net, trace(net, many), many).perm_shapes == {"first": (8,)}
