"""Buffers that training writes: they move with the units that they belong to, or those stay where they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedrebasin import InvalidSpecError, check_spec, permute, random_perms, trace
from fedrebasin.layout import Fixed
from fedrebasin.written import written_buffers

INPUTS = (torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),)


class Codebook(nn.Module):
    """Replaces what a layer says by the nearest of 7 codes; codes follow the averages of what they replace."""

    def __init__(self, *, by_data: bool = False, asks: bool = False) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.by_data, self.asks = by_data, asks
        self.register_buffer("codes", torch.randn(7, 8))
        self.register_buffer("sums", torch.randn(7, 8))
        self.register_buffer("counts", torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, 5)`` to ``(batch, 3)``."""
        h = self.into(x).tanh()
        nearest = ((h.unsqueeze(1) - self.codes) ** 2).sum(-1).argmin(-1)
        if self.training:
            if self.asks and float(self.counts.sum()) < 0:
                raise ValueError("counts are positive")
            chosen = nn.functional.one_hot(nearest, 7).to(h.dtype)
            codes, sums, counts = self.codes, self.sums, self.counts
            if self.by_data:
                codes, sums, counts = codes.data, sums.data, counts.data
            with torch.no_grad():
                counts.mul_(0.9).add_(0.1 * chosen.sum(0))
                sums.mul_(0.9).add_(0.1 * chosen.t() @ h)
                codes.copy_(sums / counts.unsqueeze(1))
        out: Tensor = self.out(h + (nn.functional.embedding(nearest, self.codes) - h).detach())
        return out


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_written_buffers_are_seen_on_a_copy(by_data: bool, asks: bool) -> None:
    net = Codebook(by_data=by_data, asks=asks)  # one that asks for a value does not run without memory
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.random.get_rng_state()
    assert written_buffers(net, INPUTS, {}) == {"codes", "sums", "counts"}
    assert all(bool((before[name] == tensor).all()) for name, tensor in net.state_dict().items())
    assert bool((random == torch.random.get_rng_state()).all())


def test_averages_that_only_training_uses_move_with_the_codes_that_they_make() -> None:
    net = Codebook()
    spec = check_spec(net, trace(net, INPUTS), INPUTS)
    assert {(axis.name, axis.dim) for axis in spec.tied["into"]} >= {("codes", 1), ("sums", 1)} and spec.training
    moved = Codebook()
    moved.load_state_dict(permute(spec, random_perms(spec, 1), net.state_dict()))
    for one in (net, moved):
        one.train()(*INPUTS)  # which makes new codes of the averages
        one.eval()
    torch.testing.assert_close(moved(*INPUTS), net(*INPUTS))


def test_a_spec_that_leaves_such_averages_behind_is_refused() -> None:
    net = Codebook()
    spec = trace(net, INPUTS)
    sums = (spec.axes["sums"][0], Fixed(8))
    with pytest.raises(InvalidSpecError, match=r"permuting 'into' alone changes an output.*leaves out 'sums' dim 1"):
        check_spec(net, replace(spec, axes={**spec.axes, "sums": sums}), INPUTS)


def test_codes_stay_where_training_cannot_be_exported() -> None:
    net = Codebook(asks=True, by_data=True)
    spec = check_spec(net, trace(net, INPUTS), INPUTS)
    assert not spec.perm_shapes and "buffers that training writes, are not used in evaluation mode" in spec.notes[0]


@pytest.mark.parametrize("asks", [False, True])
def test_a_mean_whose_memory_training_replaces_moves_with_its_units(asks: bool) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            if self.training and not (asks and float(x.sum()) != float(x.sum())):
                for step in (0.1, 0.2):  # the second may be given the memory of the first
                    self.mean.data = (1 - step) * self.mean + step * x.mean(0).detach()
            return x - self.mean

    net = nn.Sequential(nn.Linear(5, 8), Centred(), nn.ReLU(), nn.Linear(8, 2))
    assert written_buffers(net, INPUTS, {}) == {"1.mean"} and not bool(net[1].mean.any())
    assert check_spec(net, trace(net, INPUTS), INPUTS).perm_shapes == {"0": (8,)}


def test_running_statistics_need_no_second_graph() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    spec = trace(net, INPUTS)
    assert not spec.training and {axis.name for axis in spec.tied["0"]} >= {"1.running_mean", "1.running_var"}
