"""A training that was done before in the same run gives its weights and its loss, and no other training does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedrebasin.simulations.trainings import train_once


class Node:
    """Counts its trainings: each moves the weights and tells the last loss."""

    def __init__(self, value: float) -> None:
        self.model = nn.BatchNorm1d(2)
        nn.init.constant_(self.model.weight, value)
        self.trainings = 0

    def train(self) -> float:
        self.trainings += 1
        self.model(torch.arange(8.0).view(4, 2))
        nn.init.constant_(self.model.bias, 7.0)
        return 0.1

    def once(self, folder: Path | None, name: str = "node0-round1", most: int = 2**20) -> tuple[float, bool]:
        return train_once(folder, name, self.model, self.train, most=most)


def test_the_same_start_is_trained_once(tmp_path: Path) -> None:
    first, again = Node(1.0), Node(1.0)
    assert first.once(tmp_path / "seed0") == (0.1, False)
    assert again.once(tmp_path / "seed0") == (0.1, True)
    assert (first.trainings, again.trainings) == (1, 0)
    for key, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value) is value.is_floating_point()


def test_a_counter_of_batches_makes_no_other_start(tmp_path: Path) -> None:
    Node(1.0).once(tmp_path)
    further = Node(1.0)
    further.model.num_batches_tracked.fill_(7)
    assert further.once(tmp_path) == (0.1, True)
    assert further.model.num_batches_tracked == 7


def test_another_bit_of_the_start_another_name_and_no_folder_are_trained(tmp_path: Path) -> None:
    Node(1.0).once(tmp_path)
    nearest = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    for node, folder, name in (
        (Node(nearest), tmp_path, "node0-round1"),
        (Node(1.0), tmp_path, "node0-round2"),
        (Node(1.0), None, "node0-round1"),
    ):
        assert node.once(folder, name) == (0.1, False)
        assert node.trainings == 1


def test_a_full_folder_takes_no_more(tmp_path: Path) -> None:
    Node(1.0).once(tmp_path)
    kept = list(tmp_path.iterdir())
    assert Node(2.0).once(tmp_path, most=1) == (0.1, False)
    assert list(tmp_path.iterdir()) == kept
    assert Node(1.0).once(tmp_path, most=1) == (0.1, True)


def test_a_file_that_another_node_renames_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([gone]))
    assert Node(1.0).once(tmp_path) == (0.1, False)
