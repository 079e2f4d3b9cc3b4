"""Trained ends: a network trained on some of the rows, made once, saved as safetensors and used again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.kept import training_code
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.train_checkpoint import TrainCheckpoint
from fedrebasin.simulations.training import RECIPES, Progress, train

#: the ends of the disjoint experiment; the index is part of their seeds, of others the name is
END_NAMES = ("a", "b", "all")
#: least seconds between two checkpoints of a training
CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class EndConfig:
    """All that decides the weights of a trained end, but for hardware and versions."""

    dataset: str
    source: str
    held: float
    model: str
    width: int
    norm: str
    epochs: int
    seed: int
    end: str
    augment: str = "shift"
    compile: bool = False
    precision: str = "auto"


def disjoint_halves(labels: Tensor, classes: int, held: float = 0.2) -> tuple[Tensor, Tensor]:
    """Split the rows as Git Re-Basin's Section 5.4 does.

    In the order of ``default_rng(123)``, A gets the first ``held`` of the rows whose label is in the lower half
    of the classes and all but the first ``held`` of the others; B gets the rest.

    Examples
    --------
    >>> a, b = disjoint_halves(torch.arange(10).repeat(10), 10)
    >>> len(a), len(b), int((torch.arange(10).repeat(10)[a] < 5).sum())
    (50, 50, 10)
    """
    order = torch.from_numpy(np.random.default_rng(123).permutation(len(labels)))
    lower = labels[order] < classes // 2
    low, high = order[lower], order[~lower]
    cut_low, cut_high = round(held * len(low)), round(held * len(high))
    return torch.cat([low[:cut_low], high[cut_high:]]), torch.cat([low[cut_low:], high[:cut_high]])


def make_model(config: EndConfig, data: Dataset) -> nn.Module:
    """Build the end's network with the initial weights that its seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config))
        return build_model(config.model, data.shape, data.classes, width=config.width, norm=config.norm)


def trained_end(
    config: EndConfig,
    data: Dataset,
    rows: Tensor,
    folder: Path,
    *,
    device: torch.device,
    progress: Callable[[str], None],
) -> tuple[dict[str, Tensor], float]:
    """Return the end's state dict and the seconds that its training took, trained now or read from ``folder``.

    A file is used again only if its metadata names the same ``config`` and the same code for training. Until it is
    there, a checkpoint beside it is what a training that was killed goes on from.
    """
    split = f"-held{config.held:g}" if config.held else ""
    kind = f"{config.model}{config.width}-{config.norm}-{config.epochs}ep{split}"
    kind += f"-{config.precision}" if config.precision != "auto" else ""
    path = folder / f"{config.end}-{kind}-seed{config.seed}.safetensors"
    described = json.dumps({**asdict(config), "code": training_code()}, sort_keys=True)
    if path.exists():
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata.get("config") == described:
                progress(f"{path.name}: trained earlier, used again")
                # an open file has keys() but cannot be iterated
                return {key: file.get_tensor(key) for key in file.keys()}, float(metadata["seconds"])  # noqa: SIM118  # a safe_open cannot be iterated
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = TrainCheckpoint(path.with_suffix(".checkpoint"), f"{described} on {device.type}", CHECKPOINT_SECONDS)
    model = make_model(config, data)
    train(
        model,
        data,
        data.train_images[rows],
        data.train_labels[rows],
        recipe=RECIPES[config.model],
        epochs=config.epochs,
        seed=_seed(config),
        device=device,
        progress=_report(f"seed {config.seed}, end {config.end}", config.epochs, len(rows), progress),
        augment=config.augment,
        compile_model=config.compile,
        precision=config.precision,
        checkpoint=checkpoint,
    )
    seconds = checkpoint.seconds
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(state, partial, {"config": described, "seconds": f"{seconds:.1f}"})
    partial.replace(path)
    checkpoint.remove()
    return state, seconds


def _seed(config: EndConfig) -> int:
    known = config.end in END_NAMES
    name = [END_NAMES.index(config.end)] if known else [len(END_NAMES), *config.end.encode()]
    sequence = np.random.SeedSequence([config.seed, *name])
    return int(sequence.generate_state(1)[0])


def _report(label: str, epochs: int, rows: int, progress: Callable[[str], None]) -> Progress:
    last = [time.perf_counter()]

    def report(epoch: int, loss: float) -> None:
        now = time.perf_counter()
        # of this epoch alone: the first one compiles, and one after a kill is no first one
        rate = rows / (now - last[0])
        last[0] = now
        progress(f"{label}: epoch {epoch}/{epochs}, training loss {loss:.3f}, {rate:,.0f} images/s")

    return report
