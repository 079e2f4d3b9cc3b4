"""What a node does by itself, and what is measured of the nodes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations.baselines import client_baselines
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.handover import TENSORS, hand_over, take_over
from fedrebasin.simulations.partition import hold_apart
from fedrebasin.simulations.settings import Settings
from fedrebasin.simulations.silo import initial_model, rows_of_nodes, train_round


def test_a_data_set_that_is_handed_over_is_the_same(tmp_path: Path) -> None:
    data = load_dataset("digits")
    hand_over(data, tmp_path / "data.safetensors")
    copy = take_over("digits", str(tmp_path / "data.safetensors"))
    for key in TENSORS:
        assert torch.equal(getattr(copy, key), getattr(data, key))
    assert (copy.mean, copy.std, copy.classes, copy.name) == (data.mean, data.std, data.classes, data.name)


def test_rows_to_measure_on_are_a_fifth_of_each_nodes_own_and_trained_on_by_none() -> None:
    data = load_dataset("digits")
    usual, none = rows_of_nodes(Settings(), data, 3, seed=1)
    rows, held = rows_of_nodes(Settings(select="clients"), data, 3, seed=1)
    assert [len(part) for part in none] == [0, 0, 0]
    for whole, trained, apart in zip(usual, rows, held, strict=True):
        assert torch.equal(torch.cat([trained, apart]).sort().values, whole.sort().values)
        assert len(apart) == len(whole) // 5
    with pytest.raises(UsageError, match="a node with one row has none to measure on"):
        hold_apart(torch.tensor([4]), seed=0)


def test_a_silo_depends_on_seed_and_owner_alone() -> None:
    data, settings = load_dataset("digits"), Settings(model="mlp", width=8)

    def end(seed: int, owner: int) -> torch.Tensor:
        model = initial_model(settings, data, seed=seed, owner=owner)
        train_round(model, settings, data, torch.arange(100), seed=seed, owner=owner, server_round=1, epochs=1)
        return next(model.parameters()).detach()

    assert torch.equal(end(0, 0), end(0, 0))
    assert not torch.equal(end(0, 0), end(0, 1))
    assert not torch.equal(end(0, 0), end(1, 0))


def test_two_clients_that_err_apart_make_a_better_ensemble() -> None:
    target = torch.tensor([0, 1, 2])
    sure, unsure = 5.0, 1.0
    first = torch.tensor([[sure, 0, 0], [0, sure, 0], [unsure, 0, 0]])
    second = torch.tensor([[0, unsure, 0], [0, sure, 0], [0, 0, sure]])
    scores: Any = client_baselines([first, second], [target, target], target, 3)
    assert [round(client["accuracy"], 3) for client in scores["clients"]] == [0.667, 0.667]
    assert scores["ensemble"]["accuracy"] == 1.0
