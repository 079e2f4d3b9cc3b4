"""Passes up to one layer: memory changes what they cost and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from corrections_ends import draw, random_ends
from networks import Grouped
from networks_by_hand import InPlace, Residual, deep, norm_free
from torch import Tensor, nn

from fedrebasin import closed_form, merge, regmean, repair
from fedrebasin.corrections.least_squares import least_squares
from fedrebasin.corrections.passes import Runner
from fedrebasin.errors import CalibrationError, RebasinError

MAKERS = {"norm-free": norm_free, "residual": Residual, "groupnorm": Grouped, "in-place": InPlace}
IMAGES = [draw(30, 3, 8, 8, seed=seed) for seed in range(4)]


class Shuffled:
    """A loader that gives its examples in another order each time."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.generator = x, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x[torch.randperm(len(self.x), generator=self.generator)].split(20))


@pytest.mark.parametrize("correct", [partial(least_squares, ridge=1e-3), repair])
@pytest.mark.parametrize("name", ["norm-free", "residual", "groupnorm", "in-place"])
def test_memory_changes_the_cost_and_not_the_result(name: str, correct: Callable[..., dict[str, Tensor]]) -> None:
    net = InPlace().double() if name == "in-place" else MAKERS[name]().double()
    batches = [draw(60, 4), draw(50, 4, seed=1)] if name == "in-place" else IMAGES
    ends = random_ends(net)
    inputs = sum(batch.numel() * 8 for batch in batches)
    results = [
        correct(net, merge(ends), ends, batches, memory=memory)
        for memory in (2**30, 0, inputs, inputs + 6000, inputs + 100_000)
    ]
    for key in results[0]:
        for other in results[1:]:
            torch.testing.assert_close(other[key], results[0][key], rtol=1e-7, atol=1e-9)


def test_a_loader_that_shuffles_gives_the_same_with_memory_and_without() -> None:
    net, x = deep(), draw(100, 4)
    ends = random_ends(net)
    found = [
        least_squares(net, merge(ends), ends, batches, ridge=1e-3, memory=memory)
        for batches, memory in ((Shuffled(x), 2**30), (Shuffled(x), 0), ([x], 2**30))
    ]
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found[2][key], found[0][key], rtol=1e-7, atol=1e-9)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places of the layers that passes compute, in order."""
    places, keep = list[int](), Runner.keep

    def counted(self: Runner, index: int, number: int, output: Tensor, *, final: bool = True) -> None:
        places.append(index)
        keep(self, index, number, output, final=final)

    monkeypatch.setattr(Runner, "keep", counted)
    return places


@pytest.mark.parametrize(("memory", "expected"), [(2**30, 2 * 3 + 3 + 2), (0, 2 * (1 + 2 + 3) + 1 + 2 + 3)])
def test_with_memory_no_layer_is_computed_again(computed: list[int], memory: int, expected: int) -> None:
    # a layer of the merged network runs as it was, and again with what was solved
    net = deep()
    ends = random_ends(net)
    least_squares(net, merge(ends), ends, [draw(100, 4)], memory=memory)
    assert len(computed) == expected


@pytest.mark.parametrize("memory", [2**30, 0])
def test_with_memory_repair_computes_no_layer_again(computed: list[int], memory: int) -> None:
    # a corrected layer runs as it was, and again with what was fused in if another one reads it; a layer in front of a
    # BatchNorm runs once, for the BatchNorm's input
    net = nn.Sequential(
        *(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)),
    ).double()
    ends = random_ends(net, [draw(100, 4)])
    repair(net, merge(ends), ends, [draw(100, 4)], memory=memory)
    assert computed == ([0, 0, 1, 1, 2, 3, 4] if memory else [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4])


def test_negative_memory_is_refused() -> None:
    net = deep()
    with pytest.raises(RebasinError, match="memory: expected a number of bytes from 0; got -1"):
        repair(net, net.state_dict(), [net.state_dict()], [draw(100, 4)], memory=-1)


class Branches(nn.Module):
    """Takes one of two ways, by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        found: Tensor = self.last((self.one if bool(x.mean() > 1) else self.other)(x).relu())
        return found


@pytest.mark.parametrize("correct", [least_squares, repair, regmean, closed_form])
def test_a_layer_that_some_batches_do_not_reach_is_named(correct: Callable[..., dict[str, Tensor]]) -> None:
    net, data = Branches().double(), [draw(100, 4), draw(100, 4) + 100]
    ends = [{key: tensor.abs() for key, tensor in end.items()} for end in random_ends(net)]
    with pytest.raises(
        CalibrationError, match=r"does not reach 'other.*' on every batch; give batches on which it does"
    ):
        correct(net, merge(ends), ends, data)


class Stream(nn.Module):
    """Blocks that write to a stream, the second one with a shortcut through a layer, behind a look at the values."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.stem, self.short, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.first, self.second = (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2))
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.first(x)).relu_()
        x = (self.second(x) + self.short(x)).relu_()
        if self.looks and x.abs().max() > 1e6:
            raise ValueError("too large")
        return self.last(x)


@pytest.mark.parametrize("correct", [partial(least_squares, ridge=1e-3), repair])
@pytest.mark.parametrize("looks", [False, True])
def test_streams_and_models_that_look_at_values_give_the_same_with_memory(
    monkeypatch: pytest.MonkeyPatch, correct: Callable[..., dict[str, Tensor]], looks: bool
) -> None:
    net, data = Stream(looks).double(), [draw(60, 4), draw(50, 4, seed=1)]
    ends = random_ends(net, data)
    wanted = correct(net, merge(ends), ends, data, memory=0)
    computed, result = [], Runner.result

    def counted(self: Runner, index: int, number: int, needed: set[int], call: Callable[[], Tensor]) -> Tensor:
        def call_and_count() -> Tensor:
            output = call()
            computed.append((id(self), index, number, output.is_meta))
            return output

        return result(self, index, number, needed, call_and_count)

    monkeypatch.setattr(Runner, "result", counted)
    found = correct(net, merge(ends), ends, data)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(set(computed)) == len(computed)  # no step runs twice on the way to others
