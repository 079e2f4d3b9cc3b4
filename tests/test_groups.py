"""Groups whose channels are mixed: traced in time that grows with the depth, with all their freedom, and proved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedrebasin import check_spec, identity_perms, permute, random_perms, trace, weight_matching
from fedrebasin.axes import concat, leaf, product, unify
from fedrebasin.axes.families import settle_op

LINE = (torch.zeros(2, 8, 3),)


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, places = x.shape
    return x.view(batch, groups, channels // groups, places).transpose(1, 2).reshape(batch, channels, places)


class Flat(nn.Module):
    """Square layers whose weights lie in one flat parameter."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weights, self.last = nn.Parameter(torch.randn(depth * 72)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.weights.split(72):
            x = torch.relu(x @ part[:64].view(8, 8).T + part[64:])
        found: Tensor = self.last(x)
        return found


class Stacked(nn.Module):
    """Square layers whose weights, biases and gains are stacked, each kind in one parameter."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weights, self.biases = nn.Parameter(torch.randn(depth, 8, 8)), nn.Parameter(torch.randn(depth, 8))
        self.gains, self.last = nn.Parameter(torch.randn(depth, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.tanh(x @ weight + bias) * self.gains[index]
        found: Tensor = self.last(x)
        return found


class Gated(nn.Module):
    """Hidden rows of which one is read beside all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.second(self.first(x)) + self.second.weight @ self.second.weight[3])
        return found


class Shuffled(nn.Module):
    """Grouped convolutions whose channels are shuffled."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(8, 64, 1), nn.Conv1d(64, 2, 1)
        self.layers = nn.ModuleList(nn.Conv1d(64, 64, 1, groups=4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.relu(shuffled(layer(x), 4))
        found: Tensor = self.last(x)
        return found


class Unit(nn.Module):
    """A unit of ShuffleNet v1 without its norms."""

    def __init__(self, channels: int, groups: int, last: int = 0, inner: int = 0) -> None:
        super().__init__()
        inner, self.groups = inner or channels // 4, groups
        self.one = nn.Conv1d(channels, inner, 1, groups=groups)
        self.depthwise = nn.Conv1d(inner, inner, 3, padding=1, groups=inner)
        self.two = nn.Conv1d(inner, channels, 1, groups=last or groups)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.two(self.depthwise(shuffled(torch.relu(self.one(x)), self.groups))))


def shufflenet(channels: int, groups: int, depth: int) -> nn.Module:
    units = [Unit(channels, groups) for _ in range(depth)]
    return nn.Sequential(nn.Conv1d(8, channels, 1), *units, nn.Conv1d(channels, 2, 1))


def test_every_layer_of_a_flat_parameter_has_an_order_of_its_own_however_many_there_are() -> None:
    net, inputs = Flat(16), (torch.zeros(2, 8),)
    spec = check_spec(net, trace(net, inputs), inputs)
    assert list(spec.perm_shapes.values()) == [(8,)] * 16 and spec.notes == ()


def test_layers_that_are_stacked_in_one_parameter_have_orders_of_their_own() -> None:
    net, inputs = Stacked(3), (torch.zeros(2, 8),)
    spec = check_spec(net, trace(net, inputs), inputs)
    assert list(spec.perm_shapes.values()) == [(8,)] * 3 and spec.notes == ()
    assert "parts of one unit each: weights:0, biases:0, gains:0" in str(spec)
    state = net.state_dict()
    moved = permute(spec, random_perms(spec, 1), state)
    back = permute(spec, weight_matching(spec, state, moved).perms, moved)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_one_row_of_a_weight_that_is_read_whole_as_well_has_the_order_of_all() -> None:
    net, inputs = Gated(), (torch.zeros(2, 8),)
    assert sorted(check_spec(net, trace(net, inputs), inputs).perm_shapes.values()) == [(3,), (6,)]


def test_every_layer_of_shuffled_groups_adds_the_same_freedom() -> None:
    orders = [check_spec(net := Shuffled(n), trace(net, LINE), LINE).log10_order for n in (3, 4, 16)]
    assert round(orders[2] - orders[1], 6) == round(12 * (orders[1] - orders[0]), 6) > 0


def test_the_groups_of_a_shufflenet_stay_and_what_is_in_them_is_free() -> None:
    net = shufflenet(48, 2, 3)
    spec = check_spec(net, trace(net, LINE), LINE)
    assert sorted(spec.perm_shapes.values()) == [(3,)] * 12 + [(24,)] * 2
    assert len(spec.notes) == 1 and "an axis is tied to a part of itself" in spec.notes[0]
    assert "conv1d in 1.one" in spec.notes[0]


def test_a_shufflenet_whose_groups_are_as_many_as_the_channels_between_them_keeps_its_stream_free() -> None:
    net = shufflenet(64, 4, 2)
    assert sorted(check_spec(net, trace(net, LINE), LINE).perm_shapes.values()) == [(16,)] * 4


def test_freedom_that_is_lost_to_an_axis_that_depends_on_itself_is_noted() -> None:
    net = shufflenet(128, 8, 2)
    spec = check_spec(net, trace(net, LINE), LINE)
    assert len(spec.notes) == 1 and "an axis is tied to a part of itself" in spec.notes[0]


def test_factors_of_one_axis_never_become_one() -> None:
    one, two = leaf(2), leaf(2)
    settle_op([[product([one, two])]], [])
    assert not unify(one, two)
    assert one.root is not two.root and one.reason == two.reason == "twice in one axis"
    assert unify(concat([leaf(2), leaf(3)]), leaf(5))


@pytest.mark.parametrize("last", [2, 4, 8])
@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("inner", [4, 8, 16])
def test_groups_that_are_split_in_two_ways_keep_the_function_whichever_permutation_moves(
    channels: int, inner: int, last: int
) -> None:
    if inner % last:
        pytest.skip("groups that do not divide the channels")
    net = nn.Sequential(
        nn.Conv1d(8, channels, 1), Unit(channels, 2, last, inner), Unit(channels, 2, 2, 4), nn.Flatten()
    )
    net.append(nn.Linear(3 * channels, 2)).double()
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    spec, state = check_spec(net, trace(net, (x,)), (x,)), net.state_dict()
    still = identity_perms(spec)
    for name, perm in still.items():
        moved = permute(spec, {**still, name: perm.roll(1, -1)}, state)
        assert torch.allclose(functional_call(net, moved, (x,)), net(x), rtol=1e-9)
