"""Loss along a path, its barrier, and what the core may import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedrebasin import CalibrationError, LossPath, RebasinError, barrier_above_chord, loss_along_path, loss_barrier

NET = nn.Linear(2, 1, bias=False)
DATA = [
    (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0]])),
    (torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0]] * 3)),
]
A, B = {"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[-1.0, 0.0]])}


def test_losses_along_the_path_are_those_of_the_interpolated_models() -> None:
    path = loss_along_path(NET, A, B, DATA, loss=nn.functional.mse_loss, lams=5)
    assert path.lams == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert path.losses == pytest.approx([(1 - 2 * lam) ** 2 for lam in path.lams])
    assert path.best_lam == 0.5


def test_batches_of_unequal_size_weigh_by_their_examples() -> None:
    data = [(torch.ones(1, 2), torch.zeros(1, 1)), (torch.zeros(3, 2), torch.zeros(3, 1))]
    assert loss_along_path(NET, A, A, data, loss=nn.functional.mse_loss, lams=2).losses == (0.25, 0.25)


def test_batches_weigh_by_their_inputs_where_targets_are_no_tensors() -> None:
    data = [(torch.ones(1, 2), {"y": torch.zeros(1, 1)}), (torch.zeros(3, 2), {"y": torch.zeros(3, 1)})]
    path = loss_along_path(NET, A, A, data, loss=lambda output, y: nn.functional.mse_loss(output, y["y"]), lams=2)
    assert path.losses == (0.25, 0.25)


def test_the_barrier_is_zero_on_a_flat_path_and_counts_from_the_mean_of_the_ends() -> None:
    assert loss_barrier(LossPath((0, 0.5, 1), (2.0, 2.0, 2.0))) == 0
    assert loss_barrier(LossPath((0, 0.5, 1), (1.0, 4.0, 3.0))) == 2
    assert loss_barrier(LossPath((0, 0.5, 1), (0.0, 0.5, 1.0))) == 0.5
    assert barrier_above_chord(LossPath((0, 0.5, 1), (0.0, 0.5, 1.0))) == 0


@pytest.mark.parametrize("barrier", [loss_barrier, barrier_above_chord])
@pytest.mark.parametrize("lams", [(0.0, 0.5), (0.25, 1.0)])
def test_a_barrier_of_a_part_of_the_line_is_refused(
    barrier: Callable[[LossPath], float], lams: tuple[float, float]
) -> None:
    with pytest.raises(RebasinError, match=f"path: expected lams from 0 to 1.* got {lams[0]:g} to {lams[1]:g}"):
        barrier(LossPath(lams, (1.0, 2.0)))


def test_bad_paths_are_refused() -> None:
    with pytest.raises(CalibrationError, match="a batch without a target"):
        loss_along_path(NET, A, B, [torch.ones(1, 2)], loss=nn.functional.mse_loss)
    with pytest.raises(RebasinError, match="lams: expected two points or more; got 1"):
        loss_along_path(NET, A, B, DATA, loss=nn.functional.mse_loss, lams=1)
    with pytest.raises(CalibrationError, match="batches: expected a collection that can be read more than once"):
        loss_along_path(NET, A, B, iter(DATA), loss=nn.functional.mse_loss)


def test_the_core_never_imports_flower() -> None:
    code = (
        "import sys, fedrebasin; assert not any(name.split('.')[0] in ('flwr', 'ray', 'typer') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
