"""A client's label prior comes off its last layer, before its model is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedrebasin import remove_label_prior
from fedrebasin.errors import UsageError
from fedrebasin.simulations.measures import correct_prior, label_prior


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_the_logits_lose_the_log_of_the_label_shares_and_nothing_else_changes() -> None:
    net, images = small(), torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 0, 2])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = remove_label_prior(net.state_dict(), labels.bincount(minlength=3), bias="2.bias")
    assert list(state) == list(before) and hasattr(state, "_metadata")
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    wanted = correct_prior(net(images), label_prior(labels, 3)).detach()
    net.load_state_dict(state)
    assert torch.allclose(net(images), wanted, atol=1e-6)


def test_equal_shares_shift_all_classes_alike_and_half_precision_stays() -> None:
    state = {"weight": torch.ones(2, 1), "bias": torch.tensor([1.0, 2.0], dtype=torch.float16)}
    found = remove_label_prior(state, [7, 7], bias="bias")
    assert found["bias"].dtype == torch.float16
    assert torch.allclose(found["bias"] - state["bias"], torch.tensor(2.0).log().half(), atol=2e-3)


@pytest.mark.parametrize(
    ("counts", "bias", "message"),
    [
        ([1, 1, 1], "2.bais", r"bias: expected the name of the last layer's bias, such as \['0.bias', '2.bias'\]"),
        ([1, 1, 1], "2.weight", "bias: expected the name"),
        ([1, 1], "2.bias", r"label_counts: expected a number for each of the 3 entries of '2.bias'; got shape \(2,\)"),
        ([1, -1, 1], "2.bias", "label_counts: expected numbers of examples, from 0 up and not all 0"),
        ([0, 0, 0], "2.bias", "label_counts: expected numbers of examples"),
        ([float("nan"), 1, 1], "2.bias", "label_counts: expected numbers of examples"),
    ],
)
def test_what_does_not_fit_is_named(counts: Any, bias: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        remove_label_prior(small().state_dict(), counts, bias=bias)
