"""The benchmark of swaps finds the axes that a check does not see, and says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedrebasin.simulations.bench import swaps


class Net(nn.Module):
    """A trunk and a head; in training mode an auxiliary head with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.auxiliary = nn.Sequential(nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.trunk(x).relu()
        out = self.head(x.mean((2, 3)))
        return (out, self.auxiliary(x)) if self.training else (out,)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "zoo_model", lambda name: {"auxiliary": Net, "idle": Idle, "windows": Windows}[name]())


class Idle(nn.Module):
    """Hidden units that reach the output so faintly that rounding covers them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.first, self.last = nn.Linear(32, 2), nn.Linear(32, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((1, 2))
        return self.seen(x) + 1e-14 * self.last(torch.tanh(self.first(x)))


@pytest.mark.usefixtures("small")
def test_statistics_that_no_output_reads_are_unseen_and_named() -> None:
    row = swaps.unseen_swaps("auxiliary")
    assert row["input"] == "2x3x32x32" and row["axes"] > 12
    assert set(row["unseen"]) == {"auxiliary.1.running_mean dim 0", "auxiliary.1.running_var dim 0"}
    assert all("only training mode runs" in reason for reason in row["unseen"].values())


@pytest.mark.usefixtures("small")
def test_an_axis_that_the_check_is_blind_to_is_not_explained_away() -> None:
    row = swaps.unseen_swaps("idle")
    assert "first.weight dim 0" in row["unseen"] and "seen.weight dim 1" not in row["unseen"]
    assert set(row["unseen"].values()) == {"none: the check is blind here"}


class Windows(nn.Module):
    """What lies beyond the first 32 pixels is read from larger images only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.far = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        far = nn.functional.pad(x, (0, 64, 0, 64))[..., 32:96, 32:96].mean((2, 3))
        return self.seen(x.mean((2, 3))) + self.far(far)


@pytest.mark.usefixtures("small")
def test_what_only_a_larger_input_shows_is_said_with_its_size() -> None:
    row = swaps.unseen_swaps("windows")
    reason = "too few pixels: seen with an input of 2x3x64x64"
    assert row["unseen"] == {"far.weight dim 0": reason, "far.weight dim 1": reason}
