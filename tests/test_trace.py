"""What trace ties, counts, fixes and says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import networks
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fedrebasin import Axis, TraceError, UnsupportedOpError, check_spec, permute, random_perms, trace
from fedrebasin.layout import Free, Product, Sum


def test_an_mlp_with_three_hidden_layers_has_exactly_three_perms() -> None:
    net, inputs = networks.mlp()
    assert list(trace(net, inputs).perm_shapes.values()) == [(12,), (12,), (12,)]


@pytest.mark.parametrize(("name", "order"), [("resnet18", 5934), ("densenet121", 16537), ("resnext50_32x4d", 24223)])
def test_freedom_is_not_lost(name: str, order: int) -> None:
    net = getattr(torchvision.models, name)(weights=None)
    spec = trace(net, (torch.zeros(2, 3, 32, 32),))
    assert round(spec.log10_order) == order
    assert spec.notes == ()


def test_a_flattened_convolution_ties_channels_not_pixels() -> None:
    net, inputs = networks.NETWORKS["conv"]()
    spec = trace(net, inputs)
    head = spec.axes["11.weight"][1]
    assert isinstance(head, Product) and isinstance(head.factors[0], Free)
    assert head.factors[0].perm == "6" and head.size == 8 * 2 * 2


def test_concatenation_is_a_sum_of_its_parts() -> None:
    spec = trace(networks.DenseBlock(), networks.IMAGE)
    layout = spec.axes["convs.2.weight"][1]
    assert isinstance(layout, Sum) and [part.size for part in layout.parts] == [6, 4, 4]
    assert Axis("head.weight", 1) in spec.tied["stem"]


def test_units_within_each_group_have_permutations_of_their_own() -> None:
    spec = trace(networks.Grouped(), networks.IMAGE)
    assert sorted(spec.perm_shapes.values()) == [(4,), (4, 3), (4, 6)]


def test_running_statistics_move_with_their_units_and_counters_do_not() -> None:
    net, inputs = networks.NETWORKS["conv"]()
    spec = trace(net, inputs)
    assert Axis("1.running_var", 0) in spec.tied["0"]
    assert spec.axes["1.num_batches_tracked"] == ()
    assert "1.running_mean" in spec.buffers and "1.weight" in spec.parameters


def test_a_buffer_that_training_does_not_change_is_fixed() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)
            self.register_buffer("table", torch.arange(4.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.table)

    assert trace(Table(), (torch.zeros(1, 2),)).perm_shapes == {}


def test_an_op_without_a_rule_is_named_once_and_fixes_its_axes() -> None:
    spec = trace(networks.Unknown(), (torch.zeros(2, 4),))
    assert list(spec.perm_shapes) == ["second"]
    assert len(spec.notes) == 1 and "masked_scatter" in spec.notes[0]
    with pytest.raises(UnsupportedOpError, match="masked_scatter in the model: no rule covers it"):
        trace(networks.Unknown(), (torch.zeros(2, 4),), strict=True)


def test_a_zero_state_that_two_layers_share_ties_nothing() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 5), nn.Linear(3, 5)
            self.out_one, self.out_two = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(x.shape[0], 5)
            return self.out_one(torch.tanh(self.one(x)) + state) + self.out_two(torch.relu(self.two(x)) + state)

    assert len(trace(Shared(), (torch.zeros(2, 3),)).perm_shapes) == 2


class _Cells(nn.Module):
    """Two recurrent layers that begin with the same state."""

    def __init__(self, state: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.GRUCell(3, 4), nn.GRUCell(4, 4), nn.Linear(4, 2)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.state(x)
        one = self.one(x, one)
        found: Tensor = self.last(self.two(one, two))
        return found


def _twice(state: Tensor) -> tuple[Tensor, Tensor]:
    return state, state


@pytest.mark.parametrize(
    "state",
    [
        lambda x: _twice(torch.zeros(2, 4).to(x.device)),
        lambda x: _twice(torch.zeros(2, 4).type_as(x).clone()),
        lambda x: _twice(torch.zeros(4).unsqueeze(0).expand(2, -1)),
        lambda x: _twice(torch.zeros(1, 4).repeat(len(x), 1)),
        lambda x: _twice(torch.zeros(4, 1, 2)[:, 0].t().contiguous()),
        lambda x: _twice(torch.autograd.Variable(torch.zeros(8)).view(2, 4)),
        lambda x: list(torch.zeros(2, len(x), 4)),
        lambda x: torch.zeros(2, 8).chunk(2, 1),
    ],
)
def test_a_zero_state_ties_nothing_however_it_is_shaped(state: Callable[[Tensor], Any]) -> None:
    net, inputs = _Cells(state), (torch.zeros(2, 3),)
    assert list(check_spec(net, trace(net, inputs, strict=True), inputs).perm_shapes.values()) == [(4,), (4,)]


def test_a_state_that_is_written_by_way_of_a_view_ties_what_uses_it() -> None:
    def state(x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(1, 2, 4)
        zeros[0].unsqueeze(0).add_(torch.arange(4.0))
        return _twice(zeros.squeeze(0))

    net, inputs = _Cells(state), (torch.zeros(2, 3),)
    assert check_spec(net, trace(net, inputs, strict=True), inputs).perm_shapes == {}


def test_tied_weights_share_their_perms() -> None:
    net, inputs = networks.NETWORKS["two-inputs"]()
    spec = trace(net, inputs)
    assert spec.axes["out.weight"] == spec.axes["again.weight"]


@pytest.mark.parametrize("view", [lambda w: w.t(), lambda w: w.flatten()[3:27].view(4, 6)], ids=["transposed", "part"])
def test_units_of_two_views_of_one_memory_stay(view: Callable[[Tensor], Tensor]) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.w = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 6, bias=False)
            self.v = nn.Linear(6, 6, bias=False)
            self.v.weight = nn.Parameter(view(self.w.weight.data))
            self.last = nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.w(self.one(x).relu()), self.v(self.two(x).relu())], 1).relu())

    net, x = Views(), torch.randn(5, 3)
    before = net(x).detach()
    spec = check_spec(net, trace(net, (x,)), (x,))
    assert not spec.perm_shapes.keys() & {"w", "v", "one", "two"}
    assert spec.notes == (
        "w.weight and v.weight share memory and are different views of it: their units stay; give each tensor memory "
        "of its own (.clone()), or use one parameter in both places",
    )
    net.load_state_dict(permute(spec, random_perms(spec, 1), net.state_dict()))
    torch.testing.assert_close(net(x), before)


def test_parameters_side_by_side_in_one_memory_are_free() -> None:
    net = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    flat = torch.randn(30)
    net[0].weight.data, net[2].weight.data = flat[:18].view(6, 3), flat[18:].view(2, 6)
    spec = trace(net, (torch.zeros(1, 3),))
    assert list(spec.perm_shapes) == ["0"] and spec.notes == ()


def test_tracing_leaves_the_net_as_it_was() -> None:
    net, inputs = networks.NETWORKS["conv"]()
    net.train()
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trace(net, inputs)
    assert net.training and net[0].training and not net[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_layer_that_the_forward_pass_skips_is_fixed() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.last, self.spare = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.used(x).relu())

    spec = trace(Skips(), (torch.zeros(1, 2),))
    assert list(spec.perm_shapes) == ["used"]
    assert "not used in evaluation mode: spare.weight:0" in str(spec)
    assert spec.notes[0].startswith("forward uses 'spare.weight' and others neither in evaluation nor in training mode")


def test_a_model_that_leaves_torch_is_refused_with_what_to_do() -> None:
    class Leaves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(2 * x.numpy())

    with pytest.raises(TraceError, match=r"torch.export cannot export Leaves .* hand over a spec"):
        trace(Leaves(), (torch.zeros(2),))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TraceError, match=r"expected a torch.nn.Module; got function"):
        trace(lambda x: x, (torch.zeros(2),))  # type: ignore[arg-type]


def test_threads_that_trace_at_once_get_the_same_spec_and_leave_the_process_as_it_was() -> None:
    def traced(_: int) -> dict[str, Any]:
        return trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(2, 4),)).to_json()

    before = sys.stderr, logging.root.manager.disable, nn.LSTM.forward
    with ThreadPoolExecutor(3) as pool:
        assert all(spec == traced(0) for spec in pool.map(traced, range(9)))
    assert (sys.stderr, logging.root.manager.disable, nn.LSTM.forward) == before
