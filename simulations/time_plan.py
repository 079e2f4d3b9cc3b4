"""How many epochs fit into a run of so many minutes: the pace is measured, what follows is counted."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fedrebasin.errors import UsageError
from fedrebasin.simulations.acceleration import clock
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.disjoint_bench import Effort
from fedrebasin.simulations.ends import EndConfig, make_model
from fedrebasin.simulations.kept import load_kept
from fedrebasin.simulations.results import save_results
from fedrebasin.simulations.training import RECIPES, Trainer

WARM_UP_STEPS, STEPS, SECONDS = 3, 10, 20.0
#: what a forward pass costs of a gradient step; corrections do not run in half precision
FORWARD, PRECISE_FORWARD = 1 / 3, 2 / 3
#: share of the time that is left for matching and for what no count foresees
SPARE = 0.15


@dataclass(frozen=True)
class TimePlan:
    """What was planned, and from which pace."""

    minutes: float
    epochs: int
    images_per_second: float
    seconds_after_training: float


def measure_pace(
    config: EndConfig, data: Dataset, rows: Tensor, device: torch.device, seconds: float = SECONDS
) -> float:
    """Images per second of gradient steps, on a network that is thrown away; compilation and warm-up are not in it."""
    trainer = Trainer(
        make_model(config, data),
        *(data, data.train_images[rows], data.train_labels[rows]),
        recipe=RECIPES[config.model],
        epochs=1,
        seed=0,
        device=device,
        augment=config.augment,
        compile_model=config.compile,
        precision=config.precision,
    )
    batches = itertools.chain.from_iterable(trainer.maker.rows(trainer.batch) for _ in itertools.count())
    for _ in range(WARM_UP_STEPS):
        trainer.step(next(batches))
    started, steps = clock(device), 0
    while steps == 0 or clock(device) - started < seconds:
        for _ in range(STEPS):
            trainer.step(next(batches))
        steps += STEPS
    return steps * trainer.batch / (clock(device) - started)


def work_after_training(
    effort: Effort, layers: int, corrections: Sequence[str], on_path: Sequence[str], *, images: int
) -> float:
    """Images of a gradient step that measuring one seed is worth, by the passes that each correction makes.

    Parameters
    ----------
    images : int
        Test and training images that every model is measured on.

    Examples
    --------
    >>> effort = Effort(lams=25, corrected_lams=5, calibration_images=3000, curve_calibration_images=1000)
    >>> round(work_after_training(effort, 20, [], [], images=15_000))
    285000
    """
    passes = {"reset": 1, "closed-form": 4, "regmean": 2, "least-squares": 3 * layers, "distill": 40}
    passes |= {"least-squares-probabilities": 3 * layers, "least-squares+distill": 3 * layers + 40}
    merges = 2 * (len(corrections) + 2 + effort.lams + effort.corrected_lams * len(on_path))
    corrected = sum(passes.get(name, layers + 2) for name in corrections) * effort.calibration_images
    corrected += sum(
        passes.get(name, layers + 2) * effort.corrected_lams * effort.curve_calibration_images for name in on_path
    )
    return FORWARD * images * (merges + 3) + PRECISE_FORWARD * 2 * corrected


def count_layers(net: nn.Module) -> int:
    """Layers with weights, which corrections visit one after the other."""
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules())


def epochs_that_fit(minutes: float, pace: float, images: int, after: float, spent: float) -> int:
    """Epochs of ``images`` images in all, at ``pace`` a second, beside ``after`` seconds of measuring.

    Raises
    ------
    UsageError
        If there is no time for one.

    Examples
    --------
    >>> epochs_that_fit(20.0, 1000.0, 50_000, after=200.0, spent=20.0)
    16
    """
    left = (1 - SPARE) * 60 * minutes - after - spent
    epochs = int(left * pace / images)
    if epochs < 1:
        least = (images / pace + after + spent) / 60 / (1 - SPARE)
        raise UsageError(
            f"--minutes: expected at least {least:.1f} at {pace:,.0f} images/s, for one epoch and the measuring; "
            f"got {minutes:g}; fewer --corrections or --lams need less"
        )
    return epochs


def plan_once(
    path: Path,
    facts: Mapping[str, object],
    make: Callable[[], TimePlan],
    progress: Callable[[str], None],
) -> TimePlan:
    """The plan in the file at ``path`` if it is for the same facts, so that a run that goes on keeps its epochs."""
    described = json.loads(json.dumps(facts))
    if path.exists():
        earlier = load_kept(path)
        if earlier.get("facts") == described:
            return TimePlan(**earlier["plan"])
    started = time.perf_counter()
    plan = make()
    save_results(path, {"facts": described, "plan": asdict(plan)})
    progress(
        f"plan: {plan.images_per_second:,.0f} images/s (measured in {time.perf_counter() - started:.0f} s), so "
        f"{plan.epochs} epochs for each network, and {plan.seconds_after_training:.0f} s for what follows"
    )
    return plan
