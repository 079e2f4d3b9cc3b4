"""Layers are found by the functions that they call, and as matrices give what they gave."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from corrections_ends import draw, random_ends
from networks_by_hand import ByHand, InPlace
from torch import nn

from fedrebasin import merge
from fedrebasin.corrections.layers import Layer, find_steps
from fedrebasin.corrections.least_squares import least_squares
from fedrebasin.corrections.linear_maps import columns, outputs


def test_layers_are_found_by_what_they_call_and_the_log_names_what_stays(caplog: pytest.LogCaptureFixture) -> None:
    net = ByHand().double()
    ends = random_ends(net)
    merged = merge(ends)
    with caplog.at_level(logging.INFO, logger="fedrebasin"):
        found = least_squares(net, merged, ends, [draw(200, 4)])
    assert "'shared.weight' stays averaged: it is used more than once" in caplog.text
    assert torch.equal(found["shared.weight"], merged["shared.weight"])
    steps, _ = find_steps(net.eval(), (draw(2, 4),), {})
    assert [step.key for step in steps] == ["first", "second", "last.weight"]
    assert [set(step.after) for step in steps] == [set(), {0}, {1}]
    assert not torch.equal(found["second"], merged["second"])
    steps, _ = find_steps(InPlace().eval(), (torch.zeros(2, 4),), {})
    assert [set(step.after) for step in steps] == [set(), {0}, {0, 1}]


def test_what_has_no_matrix_of_its_own_is_left_with_a_reason() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.ConvTranspose2d(6, 2, 3)).eval()
    steps, left = find_steps(net, (torch.zeros(1, 3, 8, 8),), {})
    assert [step.key for step in steps] == ["0.weight"]
    assert left == {"1.weight": "a grouped convolution", "2.weight": "no linear or convolution layer reads it directly"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(2, 3, 3, padding="same"),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(2, 3, 2, padding=1),
    ],
)
def test_an_unfolded_convolution_is_a_matrix_product(layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    x = draw(3, 2, *([7] * (weight.ndim - 2)))
    net = nn.Sequential(layer).double().eval()
    (step,), _ = find_steps(net, (x,), {})
    assert isinstance(step, Layer)
    seen = F.pad(x, (1, 1, 1, 1), mode="circular") if getattr(layer, "padding_mode", "") == "circular" else x
    product = net[0].weight.flatten(1) @ columns(step, seen, tuple(weight.shape[2:])) + net[0].bias.unsqueeze(1)
    torch.testing.assert_close(product, outputs(step, net(x)))
