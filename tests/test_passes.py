"""Passes up to one layer: memory changes what they cost and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from corrections_ends import draw, random_ends
from networks import Grouped
from networks_by_hand import InPlace, Residual, deep, norm_free
from torch import Tensor

from fedrebasin import merge
from fedrebasin.corrections.least_squares import least_squares
from fedrebasin.corrections.passes import Runner

MAKERS = {"norm-free": norm_free, "residual": Residual, "groupnorm": Grouped, "in-place": InPlace}
IMAGES = [draw(30, 3, 8, 8, seed=seed) for seed in range(4)]


class Shuffled:
    """A loader that gives its examples in another order each time."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.generator = x, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x[torch.randperm(len(self.x), generator=self.generator)].split(20))


@pytest.mark.parametrize("name", ["norm-free", "residual", "groupnorm", "in-place"])
def test_memory_changes_the_cost_and_not_the_result(name: str) -> None:
    net = InPlace().double() if name == "in-place" else MAKERS[name]().double()
    batches = [draw(60, 4), draw(50, 4, seed=1)] if name == "in-place" else IMAGES
    ends = random_ends(net)
    inputs = sum(batch.numel() * 8 for batch in batches)
    results = [
        least_squares(net, merge(ends), ends, batches, ridge=1e-3, memory=memory)
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


@pytest.mark.parametrize(("memory", "expected"), [(2**30, 2 * 3 + 3 + 2), (0, 2 * (1 + 2 + 3) + 1 + 2 + 3)])
def test_with_memory_no_layer_is_computed_again(monkeypatch: pytest.MonkeyPatch, memory: int, expected: int) -> None:
    # a layer of the merged network runs as it was, and again with what was solved
    net = deep()
    ends = random_ends(net)
    computed, keep = [], Runner.keep

    def counted(self: Runner, index: int, number: int, output: Tensor, *, final: bool = True) -> None:
        computed.append(index)
        keep(self, index, number, output, final=final)

    monkeypatch.setattr(Runner, "keep", counted)
    least_squares(net, merge(ends), ends, [draw(100, 4)], memory=memory)
    assert len(computed) == expected
