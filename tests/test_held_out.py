"""Calibration data in two parts: disjoint, whole, and parted by examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, split_calibration


def numbered(sizes: list[int], start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches whose examples and targets are numbered."""
    for size in sizes:
        numbers = torch.arange(start, start + size)
        yield numbers.float().unsqueeze(1), numbers
        start += size


@pytest.mark.parametrize("sizes", [[20], [8, 8, 8], [1] * 9, [2, 1], [64] * 5, [5, 1, 30]])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_no_example_is_in_both_parts_and_none_is_lost(sizes: list[int], share: float) -> None:
    net, total = nn.Linear(1, 1), sum(sizes)
    fit, held_out = split_calibration(net, list(numbered(sizes)), share=share)
    first, second = (torch.cat([y for _, y in part]) for part in (fit, held_out))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(total))
    assert len(second) == min(total - 1, max(1, round(share * total)))
    assert all(torch.equal(x.squeeze(1), y.float()) for x, y in [*fit, *held_out])


def test_every_batch_gives_its_share_so_that_sorted_data_is_parted_well() -> None:
    data = [torch.full((16, 1), float(label)) for label in range(10)]
    _, held_out = split_calibration(nn.Linear(1, 1), data)
    assert torch.cat(held_out).flatten().long().bincount().tolist() == [4] * 10


class Shuffling:
    """A loader that draws a new order of the same numbered examples each time."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randperm(40, generator=self.generator).float().unsqueeze(1).split(10))


def test_the_parts_stay_apart_when_a_loader_shuffles() -> None:
    fit, held_out = split_calibration(nn.Linear(1, 1), Shuffling())
    for _ in range(2):
        assert not set(torch.cat(fit).flatten().tolist()) & set(torch.cat(held_out).flatten().tolist())


def test_where_rows_are_time_steps_whole_batches_are_parted() -> None:
    data = [torch.randn(6, 5, 3) for _ in range(8)]
    fit, held_out = split_calibration(nn.LSTM(3, 4), data)
    assert [len(fit), len(held_out)] == [6, 2]
    assert all(any(batch is one for one in data) for batch in [*fit, *held_out])
    by_rows = split_calibration(nn.LSTM(3, 4, batch_first=True), data)
    assert len(torch.cat(by_rows[1])) == 12


def test_calibration_that_cannot_be_parted_is_refused() -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(CalibrationError, match="calibration: expected two examples or more, to keep one apart"):
        split_calibration(net, [torch.zeros(1, 1)])
    with pytest.raises(CalibrationError, match=r"got one batch \(its rows are not examples to this network\)"):
        split_calibration(nn.LSTM(3, 4), [torch.randn(6, 5, 3)])
    with pytest.raises(RebasinError, match="share: expected a number between 0 and 1; got 1"):
        split_calibration(net, [torch.zeros(4, 1)], share=1)
    with pytest.raises(CalibrationError, match="calibration: the model cannot run on its first batch: RuntimeError"):
        split_calibration(net, [torch.zeros(4, 3)])
    with pytest.raises(CalibrationError, match="can be read more than once"):
        split_calibration(net, numbered([4]))
