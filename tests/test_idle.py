"""What a model computes and does not use, or uses for its shape alone, costs no freedom."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch_version import sets_attributes

from fedrebasin import check_spec, trace
from fedrebasin.idle import drop_idle
from fedrebasin.layout import Free
from fedrebasin.rules import op_name

X = (torch.randn(3, 4),)
ORDER = torch.tensor([3, 0, 5, 1, 2, 4])


class Net(nn.Module):
    """Two layers with ``between`` applied to the hidden units, and a buffer."""

    seen: Tensor

    def __init__(self, between: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 6), nn.Linear(6, 2), between
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.between(self, self.first(x).tanh()))
        return found


def _unused(*results: object) -> Tensor:
    """The last of what was computed."""
    assert isinstance(results[-1], Tensor)
    return results[-1]


def _without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h * torch.ones_like(_unused(h.cumsum(-1), h[:, :1]))


@pytest.mark.parametrize(
    "between",
    [
        lambda _, h: _unused(h.cumsum(-1), h),
        lambda _, h: _unused(h[:, :3].detach().flip(1), h),
        lambda _, h: _unused(h.sort(-1)[1][:, 0].sum(), h),
        lambda _, h: h.view(h[:, 0].shape[0], 6),
        lambda _, h: h * h[:, :1].size(1) + h[:, :3].numel(),
        lambda _, h: h * torch.ones_like(h[:, :1]),
        lambda _, h: h * torch.ones_like(h[..., 0])[..., None],
        lambda _, h: h + torch.zeros_like(h[:, ::2]).sum(1, keepdim=True),
        lambda _, h: h * torch.full_like(h[:, 2:3], 2.0),
        lambda _, h: h + torch.empty_like(h[:, :1]).fill_(2.0),
        lambda _, h: h * torch.rand_like(h[:, :1]),
        lambda _, h: h * torch.randn_like(h[:, 1:2]),
        lambda _, h: h + h.new_zeros(h[:, :1].shape) + h.new_ones(h[:, :1].shape) * h.new_full(h[:, :1].shape, 3.0),
        lambda _, h: h * h[:, :1].new_ones(1),
        lambda _, h: h + h.mean(1, keepdim=True).expand_as(h.cumsum(1)),
        lambda _, h: h + torch.arange(3).view(3, 1).type_as(h[:, 0]),
        lambda _, h: h * torch.ones_like(h[:, :1].to(torch.float32)),
        lambda _, h: _without_gradient(h),
    ],
)
def test_what_is_not_used_or_lends_its_shape_alone_costs_nothing(between: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(between)
    assert check_spec(net, trace(net, X, strict=True), X).perm_shapes == {"first": (6,)}


def _written(net: Net, h: Tensor) -> Tensor:
    net.seen.copy_(h.detach().cumsum(-1).mean(0))
    return h


def _written_without_gradient(net: Net, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.seen.copy_(h.cumsum(-1).mean(0))
    return h


def _filled(net: Net, h: Tensor) -> Tensor:
    gate = torch.zeros_like(h[:, :1])
    gate.add_(h[:, :1])
    return h * gate


def _checked(net: Net, h: Tensor) -> Tensor:
    torch._assert_async((h[:, 0] < 1e9).all())
    return h


@pytest.mark.parametrize(
    ("between", "shapes"),
    [
        (lambda _, h: h * h[:, :1], [(5,)]),
        (lambda _, h: h * (torch.ones_like(h[:, :1]) + h[:, :1]), [(5,)]),
        (_filled, [(5,)]),
        (_checked, [(5,)]),
        (_written, []),
        (_written_without_gradient, []),
    ],
)
def test_values_that_are_used_written_or_checked_keep_their_places(
    between: Callable[[Net, Tensor], Tensor], shapes: list[tuple[int, ...]]
) -> None:
    net = Net(between)
    assert list(trace(net, X, strict=True).perm_shapes.values()) == shapes


class TimeConv(nn.Module):
    """As torchdiffeq's ``ConcatConv2d``: the time is one more channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, time: float, x: Tensor) -> Tensor:
        found: Tensor = self.layer(torch.cat([torch.ones_like(x[:, :1]) * time, x], 1))
        return found


class Flow(nn.Module):
    """A residual stream of six channels, stepped by layers that see the time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Conv2d(1, 6, 3), TimeConv(6), TimeConv(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for time in (0.0, 0.5):
            h = h + 0.5 * self.two(time, self.one(time, h).relu())
        found: Tensor = self.head(h.mean((2, 3)))
        return found


def test_a_channel_of_the_time_leaves_all_others_free_and_permuting_them_by_hand_keeps_the_outputs() -> None:
    net, x = Flow().double(), torch.randn(2, 1, 6, 6, dtype=torch.float64)
    assert check_spec(net, trace(net, (x,), strict=True), (x,)).perm_shapes == {"stem": (6,), "one.layer": (6,)}
    state, behind = net.state_dict(), torch.cat([torch.tensor([0]), ORDER + 1])
    moved = {name: state[name][ORDER] for name in ("stem.weight", "stem.bias", "two.layer.weight", "two.layer.bias")}
    moved |= {"one.layer.weight": state["one.layer.weight"][:, behind], "head.weight": state["head.weight"][:, ORDER]}
    torch.testing.assert_close(functional_call(net, {**state, **moved}, (x,)), net(x))


class Beside(nn.Module):
    """A layer that only what the model keeps beside its outputs goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.loss = self.aux(h[:, :3]).square().sum()
        found: Tensor = self.last(h)
        return found


@sets_attributes
@pytest.mark.filterwarnings("ignore:The tensor attribute self.loss was assigned")
def test_a_layer_that_only_a_kept_loss_reads_moves_with_the_units_that_it_reads() -> None:
    spec = trace(Beside(), X, strict=True)
    assert sorted(spec.perm_shapes.values()) == [(3,), (3,), (5,)]
    assert spec.notes == ()
    (read,) = spec.axes["aux.weight"][1:]
    assert isinstance(read, Free) and len(spec.tied[read.perm]) == 4


class Counted(nn.Module):
    """A norm that runs twice, once for its running statistics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.last = (
            nn.Linear(4, 6),
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Linear(12, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        self.norm(two)
        found: Tensor = self.last(torch.cat([self.norm(one), two], -1))
        return found


def test_running_statistics_of_an_output_that_nothing_uses_are_tied() -> None:
    net = Counted()
    assert list(check_spec(net, trace(net, X, strict=True), X).perm_shapes.values()) == [(6,)]


class ByAutocast(nn.Module):
    """As vit-pytorch's RvT: what only lends its type goes into a module of its own that turns autocast off."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scales", torch.linspace(1.0, 5.0, 8))

        @torch.autocast("cuda", enabled=False)
        def forward(self, x: Tensor) -> Tensor:
            steps = torch.linspace(-1.0, 1.0, x.shape[1]).unsqueeze(-1)
            return (steps * self.scales.to(x)).sin()

    def __init__(self) -> None:
        super().__init__()
        self.into, self.steps, self.out = nn.Linear(4, 8), self.Steps(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x[:, :1], x], 1)
        found: Tensor = self.out(self.into(h)[:, 1:] * self.steps(h[:, 1:]).sum(-1, keepdim=True))
        return found


def test_an_idle_node_that_its_giver_does_not_know_of_goes() -> None:
    inputs = (torch.randn(2, 5, 4),)
    program = torch.export.export(ByAutocast(), inputs, strict=False)
    (giver,) = [node for node in program.graph.nodes if op_name(node) == "cat"]
    idle = next(node for node in program.graph.nodes if op_name(node) == "slice" and giver in node.all_input_nodes)
    giver.users.pop(idle, None)
    drop_idle(program)
    assert idle not in program.graph.nodes
    net = ByAutocast()
    assert check_spec(net, trace(net, inputs, strict=True), inputs).perm_shapes == {"into": (8,)}
