"""The check sees which units are looked at otherwise than by what reads them; their number cannot change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import (
    PermutationSpec,
    RebasinError,
    check_spec,
    match_trunks,
    matched_averaging,
    merge_units,
    trace,
    zip_trunks,
)

X = (torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class OneHead(nn.Module):
    """Attention without heads: its queries and keys meet each other, and no weight reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.query(x) @ self.key(x).T).softmax(-1) @ x)


class Tied(nn.Module):
    """An autoencoder whose one weight is written by its rows, and read by them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).relu(), self.encode.weight.T)


def behind(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), middle, nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: behind(nn.LayerNorm(8, elementwise_affine=False)),
    "RMSNorm": lambda: behind(nn.RMSNorm(8, elementwise_affine=False)),
    "softmax": lambda: behind(nn.Softmax(-1)),
    "mean": lambda: behind(Centred()),
    "attention": OneHead,
    "tied": Tied,
}


def checked(net: nn.Module) -> PermutationSpec:
    return check_spec(net, trace(net, X), X)


@pytest.mark.parametrize("kind", WHOLE)
def test_units_that_something_else_than_their_readers_looks_at_are_neither_merged_nor_added(kind: str) -> None:
    net = WHOLE[kind]()
    spec = checked(net)
    assert len(spec.whole) == 1
    for resize in (
        lambda: merge_units(spec, net.state_dict(), 4),
        lambda: matched_averaging([spec], [net.state_dict()]),
    ):
        with pytest.raises(RebasinError, match=rf"units of '{spec.whole[0]}' which nobody reads change an output"):
            resize()


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_units_that_only_their_readers_look_at_are_found_to_be_so(name: str) -> None:
    net, inputs = networks.NETWORKS[name]()
    assert check_spec(net, trace(net, inputs), inputs).whole == ()


def test_what_is_whole_stays_so_by_another_name_and_in_a_file_and_the_rest_can_be_merged(tmp_path: Path) -> None:
    net = behind(nn.Softmax(-1))
    spec = checked(net).rename({"0": "first"})
    assert spec.whole == ("first",)
    spec.save(tmp_path / "spec.json")
    assert PermutationSpec.load(tmp_path / "spec.json") == spec
    assert merge_units(spec.fix("first"), net.state_dict(), 3).units == {"2": 3}


@pytest.mark.parametrize("turn", [1, -1])
def test_a_head_that_looks_at_all_units_of_the_trunks_last_layer_keeps_it_from_being_zipped(turn: int) -> None:
    nets = [behind(nn.ReLU()), behind(nn.Softmax(-1))][::turn]
    specs, states = [checked(net) for net in nets], [net.state_dict() for net in nets]
    assert match_trunks(specs, states, until="0").perms
    with pytest.raises(RebasinError, match="units of '0' which nobody reads change an output"):
        zip_trunks(specs, nets[0], states, [X[0]], until="0")
