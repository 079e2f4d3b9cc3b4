"""Clipped sums where an example has several positions, in one axis with the examples or in front of them."""

from __future__ import annotations

import math

import pytest
import torch
from test_federated_corrections import draw
from test_privacy import LOOSE
from test_private_sums import released_vector
from torch import Tensor, nn

from fedrebasin.corrections.federated import Node, answer
from fedrebasin.corrections.layers import find_steps
from fedrebasin.corrections.least_squares import layer_equations
from fedrebasin.corrections.moments import Moments
from fedrebasin.corrections.passes import Memory, Runner
from fedrebasin.corrections.privacy import ClippedMoments, Privacy
from fedrebasin.corrections.private_sums import ClippedEquations
from fedrebasin.errors import RebasinError

TIGHT = Privacy(clip=0.7, noise=1.0)


class Tokens(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.one, self.other, self.first = nn.Linear(3, 4), nn.Linear(4, 2), first

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1) if self.first else x.flatten(0, 1)
        return self.other(self.one(rows).relu()).mean().expand(len(x))


def spoiled(size: float, examples: int) -> Tensor:
    x = draw(examples, 10, 3)
    x[5] = size * draw(3, seed=1)
    return x


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_one_example_moves_a_layers_sums_by_no_more_than_noise_is_scaled_to(first: bool, split: bool) -> None:
    net, vectors = Tokens(first=first).double(), list[Tensor]()
    steps, _ = find_steps(net, (draw(2, 10, 3),), {})
    for size in (1e3, 0):
        ours, end = (Runner(net, steps, Memory(0), keep=False) for _ in range(2))
        batch = ((spoiled(size, 12),), dict[str, Tensor]())
        parts = layer_equations(ours, [end], [1.0], 1, steps[1], [batch], split=split, privacy=TIGHT)
        vectors.append(
            torch.cat([released_vector(one) for one in parts if isinstance(one, ClippedEquations) and one.count])
        )
    assert float((vectors[0] - vectors[1]).norm()) <= math.sqrt(2) * 0.7**2 * 4 * 1.5


@pytest.mark.parametrize("examples", [12, 10])
@pytest.mark.parametrize("first", [False, True])
def test_one_example_moves_moments_by_no_more_than_noise_is_scaled_to(first: bool, examples: int) -> None:
    vectors = []
    for size in (1e3, 0):
        x, moments = spoiled(size, examples), ClippedMoments(TIGHT)
        moments.add(x.transpose(0, 1) if first else x.flatten(0, 1), 2 if first else 1, examples)
        vectors.append(torch.cat([moments.mean, moments.squares]))
    assert float((vectors[0] - vectors[1]).norm()) <= 2 * 0.7 * math.sqrt(2 * 3)


@pytest.mark.parametrize("first", [False, True])
def test_what_a_node_answers_where_nothing_is_clipped_are_the_moments_of_all_positions(first: bool) -> None:
    net, x = Tokens(first=first).double(), draw(12, 10, 3)
    node = Node(net, net.state_dict(), {}, [x[:5], x[5:]], privacy=LOOSE)
    found, exact = answer("moments", {"merged-sites": ["one"], "sequential": True}, node), Moments()
    exact.add(net.one(x), 2)
    assert found["merged.one.count"] == 120
    torch.testing.assert_close(found["merged.one.mean"], exact.mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["merged.one.squares"], exact.squares, rtol=1e-6, atol=1e-8)


def test_moments_are_refused_where_examples_cannot_have_equally_many_positions() -> None:
    with pytest.raises(RebasinError, match=r"privacy: a layer meets 2.5 positions an example; expected the same whole"):
        ClippedMoments(TIGHT).add(draw(10, 3), 1, examples=4)
