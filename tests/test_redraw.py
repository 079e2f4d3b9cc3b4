"""The weights that a proof is made on keep every unit alive, and magnify no rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedrebasin import check_spec, trace
from fedrebasin.batches import Batches
from fedrebasin.proof import Proof, cycles


def _proof(net: nn.Module, *inputs: Tensor) -> Proof:
    return Proof(net, trace(net, inputs), inputs, seed=0)


class _Gate(nn.Module):
    """Squeeze and excite, at one pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


def test_the_end_of_a_deep_network_sees_its_start_and_magnifies_no_rounding() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), _Gate(8))

    net = nn.Sequential(nn.Conv2d(3, 8, 1), *(block() for _ in range(40)), nn.Flatten())
    proof = _proof(net, torch.zeros(2, 3, 4, 4))
    assert proof.change(cycles(proof.spec, proof.generator)) < 1e-9
    first = proof.state["0.weight"]
    assert proof.change_to({**proof.state, "0.weight": first.roll(1, 0)}) > 1e-3


def test_units_behind_a_pool_are_alive_in_at_least_one_image() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 64))
    for seed in range(3):
        inputs = (torch.zeros(2, 3, 8, 8),)
        units = Proof(net, trace(net, inputs), inputs, seed).outputs[0]
        assert int((units > 0).any(0).sum()) == 64


def test_running_statistics_follow_their_input() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.BatchNorm1d(6, affine=False))
    (units,) = _proof(net, torch.zeros(64, 5)).outputs
    assert bool((units.mean(0).abs() < 1e-12).all())
    assert 0.2 < float(units.std()) < 5


def test_one_example_leaves_units_of_both_signs() -> None:
    net = nn.Sequential(nn.Linear(5, 64), nn.PReLU(64), nn.Linear(64, 2))
    proof = _proof(net, torch.zeros(1, 5))
    units = F.linear(proof.inputs[0][0][0], proof.state["0.weight"], proof.state["0.bias"])
    assert 8 < int((units > 0).sum()) < 60


def test_what_is_equal_up_to_rounding_is_not_blown_up() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(-1)

    net = nn.Sequential(nn.Conv1d(1, 3, 1), nn.InstanceNorm1d(3, affine=True), Mean(), nn.Linear(3, 2))
    proof = _proof(net, torch.zeros(2, 1, 7))
    assert float(proof.state["3.weight"].abs().max()) < 100


def test_a_tied_weight_stays_tied_and_is_set_once() -> None:
    first = nn.Linear(6, 6)
    net = nn.Sequential(first, nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), first)
    proof = _proof(net, torch.zeros(4, 6))
    assert proof.state["0.weight"] is proof.state["4.weight"]
    size = (F.linear(proof.inputs[0][0][0], proof.state["0.weight"])).std()
    assert 0.5 < float(size) < 1.5


def test_a_product_with_a_sparse_matrix_is_proved() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            edges = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.ones(3, dtype=x.dtype), (3, 3))
            return self.last(edges @ self.first(x).relu())

    net, inputs = Graph(), (torch.zeros(3, 4),)
    spec = check_spec(net, trace(net, inputs), inputs)
    assert spec.checked


def test_auxiliary_layers_of_training_mode_are_set_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head, self.aux = nn.Linear(4, 400), nn.Linear(400, 2), nn.Linear(400, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = 100 * self.trunk(x).relu()
            return (self.head(x), self.aux(x)) if self.training else (self.head(x),)

    proof = _proof(Auxiliary(), torch.zeros(8, 4))
    assert [0.5 < float(output.std()) < 2 for output in proof.outputs] == [True, True, True]


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_a_mask_of_attention_stays_a_mask(hidden: float) -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)
            self.register_buffer("mask", torch.full((5, 5), hidden).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.encoder(x, mask=self.mask))
            return out

    net, inputs = Causal(), (torch.randn(4, 5, 8),)
    assert check_spec(net, trace(net, inputs), inputs).checked


class Pair(NamedTuple):
    x: Tensor
    mask: Tensor


@pytest.mark.parametrize("given", [Pair(torch.randn(3, 4), torch.ones(3, 1)), [torch.randn(3, 4), torch.ones(3, 1)]])
def test_inputs_keep_their_containers(given: Any) -> None:
    class Contained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, batch: Any) -> Tensor:
            x, mask = batch if isinstance(batch, list) else (batch.x, batch.mask)
            out: Tensor = self.last(self.first(x).relu() * mask)
            return out

    net = Contained()
    assert check_spec(net, trace(net, (given,)), (given,)).checked
    ((moved,), _, _) = next(iter(Batches([(given,)], device="meta")))
    assert type(moved) is type(given) and all(tensor.is_meta for tensor in moved)
