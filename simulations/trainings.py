"""Trainings that a node has done before in the same run are not done again: their start and recipe name them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from fedrebasin.whole_file import whole_file

#: bytes of weights that are kept at most in one folder; what comes after is trained each time
MOST_BYTES = 2**31


def kept_in(folder: str, seed: int) -> Path | None:
    """Where the trainings of a seed are kept: in ``folder``, the run's own, which does not outlive it, or, "", nowhere.

    >>> kept_in("trainings", 3).as_posix()
    'trainings/seed3'
    """
    return Path(folder) / f"seed{seed}" if folder else None


def train_once(
    folder: Path | None, name: str, model: nn.Module, train: Callable[[], float], *, most: int = MOST_BYTES
) -> tuple[float, bool]:
    """Train ``model`` in place, or give it the weights that the same training gave before.

    Strategies of one comparison often send a node the same weights, bit for bit: all of them in round 1, and those
    that tie in every round. Where a node trains apart, nothing that the server sends matters. BatchNorm's counters of
    batches, which strategies average differently, decide nothing: they are not looked at, and stay as they are.

    Parameters
    ----------
    folder : Path, optional
        Where trained weights are kept; without one each training is done.
    name : str
        Of everything that decides the training, but for the weights that ``model`` has now.
    train : callable
        Trains ``model`` in place and returns the loss of the last epoch.

    Returns
    -------
    loss : float
    reused : bool
        Whether an earlier training's weights were taken.
    """
    if folder is None:
        return train(), False
    start = hashlib.sha256(save(_weights(model))).hexdigest()
    path = folder / f"{name}-{start}.safetensors"
    if path.exists():
        state = load_file(path)
        loss = float(state.pop("loss"))
        model.load_state_dict(state, strict=False)
        return loss, True
    loss = train()
    folder.mkdir(parents=True, exist_ok=True)
    if _bytes_in(folder) < most:
        with whole_file(path) as file:
            save_file({**_weights(model), "loss": torch.tensor(loss, dtype=torch.float64)}, file)
    return loss, False


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in model.state_dict().items() if value.is_floating_point()}


def _bytes_in(folder: Path) -> int:
    """Of files that are there all the time: other nodes' processes write theirs."""
    total = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total
