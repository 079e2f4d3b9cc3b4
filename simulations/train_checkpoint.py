"""A training that was killed goes on: weights, momenta and random states, written between epochs as safetensors."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass
class TrainCheckpoint:
    """Where a training is kept, and how often.

    Attributes
    ----------
    path : Path
        A safetensors file; it is replaced as a whole, so that a killed process leaves the last one readable.
    described : str
        All that decides the training: a file that names something else is not used.
    every : float
        Least seconds between two writes: a wide network's file holds gigabytes.
    """

    path: Path
    described: str
    every: float = 120.0
    _written: float = field(default_factory=lambda: time.monotonic())
    _spent: float = 0.0
    _started: float = field(default_factory=lambda: time.perf_counter())

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, generators: Sequence[torch.Generator]
    ) -> tuple[int, int]:
        """Set model, optimizer and generators to what was kept; returns epochs and steps done."""
        if not self.path.exists():
            return 0, 0
        with safe_open(self.path, framework="pt") as file:
            kept = file.metadata() or {}
            if kept.get("described") != self.described:
                return 0, 0
            # an open file has keys() but cannot be iterated
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a safe_open cannot be iterated
        model.load_state_dict(_below(tensors, "model."))
        for number, parameter in enumerate(_parameters(optimizer)):
            state = _below(tensors, f"optimizer.{number}.")
            on = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")  # of a count of steps
            optimizer.state[parameter] = {
                key: _like(value, parameter) if value.shape == parameter.shape else value.to(on)
                for key, value in state.items()
            }
        for number, generator in enumerate(generators):
            generator.set_state(tensors[f"generator.{number}"])
        self._spent = float(kept["seconds"])
        return int(kept["epoch"]), int(kept["steps"])

    def keep(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generators: Sequence[torch.Generator],
        *,
        epoch: int,
        steps: int,
    ) -> None:
        """Write the state after ``epoch``, unless the last write is too near."""
        if time.monotonic() - self._written < self.every:
            return
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        for number, parameter in enumerate(_parameters(optimizer)):
            state = optimizer.state[parameter]
            tensors |= {f"optimizer.{number}.{key}": one for key, one in state.items() if isinstance(one, Tensor)}
        tensors |= {f"generator.{number}": one.get_state() for number, one in enumerate(generators)}
        facts = {"described": self.described, "epoch": epoch, "steps": steps, "seconds": self.seconds}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            partial,
            {name: one if isinstance(one, str) else json.dumps(one) for name, one in facts.items()},
        )
        partial.replace(self.path)
        self._written = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a kill included."""
        return self._spent + time.perf_counter() - self._started

    def remove(self) -> None:
        """Remove the file: the training is over."""
        self.path.unlink(missing_ok=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device and in its memory layout: an update then keeps its bits."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
