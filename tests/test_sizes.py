"""Sizes that depend on the data, and masks of booleans."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks_recurrent import LAST_STATES
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from fedrebasin import PermutationSpec, check_spec, trace

X = (torch.linspace(-1, 1, 20).view(5, 4),)
EDGES = torch.tensor([[0, 1, 2, 3, 4, 2], [1, 2, 3, 4, 0, 2]])
Step = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two layers with a step between them, and weights that it may use."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(4, 8), nn.Linear(8, 2), step
        self.gate, self.mask = nn.Parameter(torch.linspace(-1, 1, 8)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.step(self, self.first(x)))
        return found


class Graph(nn.Module):
    """A graph convolution with self-loops in the place of those that are there, and a sum over each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor, graphs: Tensor) -> Tensor:
        loops = torch.arange(len(x)).expand(2, -1)
        edges = torch.cat([edges[:, edges[0] != edges[1]], loops], 1)
        hidden = self.first(x)
        hidden = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        hidden = F.dropout(F.relu(self.norm(hidden)), 0.5, self.training)
        pooled = hidden.new_zeros(int(graphs.max()) + 1, 8).index_add(0, graphs, hidden)
        found: Tensor = self.last(pooled)
        return found


def proved(net: nn.Module, inputs: Any = X) -> PermutationSpec:
    return check_spec(net, trace(net, inputs, strict=True), inputs)


def test_a_graph_network_is_traced_silently_and_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    net = Graph()
    before, random = {name: tensor.clone() for name, tensor in net.state_dict().items()}, torch.get_rng_state()
    spec = trace(net, (X[0], EDGES, torch.tensor([0, 0, 1, 1, 1])), strict=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    said = capfd.readouterr()
    assert said.out == said.err == ""
    assert spec.perm_shapes == {"first": (8,)}
    assert {axis.name for axis in spec.tied["first"]} >= {"first.weight", "norm.running_mean", "last.weight"}
    # other sizes than those of the trace
    check_spec(net, spec, (torch.randn(6, 4), EDGES, torch.tensor([0, 1, 2, 3, 3, 3])))


@pytest.mark.parametrize("rows", [lambda h: h.sum(1) > 0, lambda h: h.sum(1) > 99, lambda h: h.sum(1) > -99])
def test_rows_that_a_mask_leaves_keep_their_units_free(rows: Callable[[Tensor], Tensor]) -> None:
    assert proved(Net(lambda _, h: h[rows(h)])).perm_shapes == {"first": (8,)}


@pytest.mark.parametrize(
    "step",
    [
        lambda h, graphs: h.repeat_interleave(graphs + 1, 0),
        lambda h, graphs: h[torch.where(graphs > 0)[0]],
        lambda h, graphs: torch.stack([part.sum(0) for part in h.split(torch.bincount(graphs).tolist())]),
        lambda h, graphs: pad_sequence([h[graphs == one] for one in range(2)]).sum(0),
    ],
)
def test_rows_by_numbers_in_the_input_keep_their_units_free(step: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Grouped(Net):
        def forward(self, x: Tensor, graphs: Tensor) -> Any:
            return self.last(step(self.first(x), graphs))

    net = Grouped(lambda _, h: h)
    assert proved(net, (X[0], torch.tensor([0, 0, 1, 1, 1]))).perm_shapes == {"first": (8,)}


def test_units_that_a_mask_chooses_stay() -> None:
    spec = proved(Net(lambda net, h: h[:, net.gate > 2].sum(1, keepdim=True) + h))
    assert spec.perm_shapes == {}
    assert "places in a row, by a mask" in str(spec)


def _without_some(net: Net, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, net.gate > 0] = 0
    return h


def _other_rows(net: Net, h: Tensor) -> Tensor:
    h = h.clone()
    h[h.sum(1) > 0] = net.gate
    return h


def _without_some_weights(net: Net, h: Tensor) -> Tensor:
    weight = net.first.weight.clone()
    weight[net.mask > 0] = 0
    return h + F.linear(X[0], weight)


@pytest.mark.parametrize(
    ("step", "tied"), [(_without_some, "gate"), (_other_rows, "gate"), (_without_some_weights, "mask")]
)
def test_a_mask_moves_with_what_it_covers(step: Step, tied: str) -> None:
    (axes,) = proved(Net(step)).tied.values()
    assert tied in {axis.name for axis in axes}


def test_values_that_go_to_a_masks_places_in_a_row_fix_them() -> None:
    def filled(net: Net, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, torch.tensor([True, False] * 4)] = net.gate[:4] + net.gate[4:]
        return h

    assert proved(Net(filled)).perm_shapes == {}


def test_a_model_that_keeps_a_cache_is_traced_without_it() -> None:
    class Cached(Net):
        def __init__(self) -> None:
            super().__init__(lambda _, h: h)
            self.config = SimpleNamespace(use_cache=True)

        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return (found, SimpleNamespace(keys=found)) if self.config.use_cache else found

    net = Cached()
    assert proved(net).perm_shapes == {"first": (8,)}
    assert net.config.use_cache is True


class Packed(nn.Module):
    """Sequences of their own lengths through a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], *, first: bool, state: bool, **options: Any) -> None:
        super().__init__()
        self.core = kind(4, 6, batch_first=first, **options)  # type: ignore[call-arg]  # the base has a mode
        width = 6 * (2 if self.core.bidirectional else 1)
        self.last, self.state = nn.Linear(width, 2), state

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        found, hidden = self.core(packed)
        if self.state:
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            ends = [hidden[-2], hidden[-1]] if self.core.bidirectional else [hidden[-1]]
            return self.last(torch.cat(ends, 1))  # type: ignore[no-any-return]
        padded, counts = pad_packed_sequence(found, batch_first=True, total_length=9)
        return self.last(padded.sum(1) / counts.unsqueeze(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {}), (nn.GRU, {"num_layers": 2}), (nn.RNN, {"bidirectional": True}), (nn.LSTM, {"num_layers": 2})],
)
def test_packed_sequences_are_traced_and_proved(
    kind: type[nn.RNNBase], options: dict[str, Any], first: bool, state: bool
) -> None:
    if kind is nn.LSTM and not LAST_STATES:
        pytest.skip("torch gives the states of a packed LSTM wrong shapes")
    net = Packed(kind, first=first, state=state, **options)
    spec = proved(net, (torch.randn(3, 7, 4), torch.tensor([4, 7, 2])))
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert sorted(spec.perm_shapes.values()) == [(6,)] * count
    found = net(torch.randn(3, 7, 4), torch.tensor([4, 7, 2]))  # nothing is left patched
    assert found.shape == (3, 2)


def test_packed_sequences_with_a_learned_state_and_from_a_list() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.last = nn.GRU(4, 6), nn.Linear(6, 2)
            self.start = nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x: Tensor) -> Any:
            packed = pack_sequence([x[0, :3], x[1, :2]])
            return self.last(self.core(packed, self.start.expand(-1, 2, -1).contiguous())[1][0])

    spec = proved(Learned(), (torch.randn(2, 4, 4),))
    assert spec.perm_shapes == {"start:2": (6,)} or set(spec.perm_shapes.values()) == {(6,)}
    assert {"start", "core.weight_hh_l0", "last.weight"} <= {axis.name for axes in spec.tied.values() for axis in axes}
