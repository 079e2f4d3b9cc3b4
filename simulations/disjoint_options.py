"""What the disjoint experiment can be asked for, and the configurations that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedrebasin.errors import UsageError
from fedrebasin.matching.methods import METHODS
from fedrebasin.simulations.acceleration import PRECISIONS
from fedrebasin.simulations.augment import AUGMENTATIONS
from fedrebasin.simulations.data import CATALOGUE, Dataset
from fedrebasin.simulations.disjoint_bench import CORRECTIONS, Effort
from fedrebasin.simulations.ends import END_NAMES, EndConfig
from fedrebasin.simulations.models import DEFAULT_WIDTHS
from fedrebasin.simulations.training import RECIPES

#: data set -> model and epochs that suit two CPU cores
DEFAULTS = {"digits": ("mlp", 30), "mnist": ("mlp", 10), "cifar10": ("conv", 12), "cifar100": ("resnet20", 20)}
#: networks that one run can train
ENDS = (END_NAMES, ("a", "b"), ("all",))


@dataclass(frozen=True)
class DisjointOptions:
    """What ``fedrebasin reproduce disjoint`` was asked for; None stands for the data set's default.

    Attributes
    ----------
    held : float
        Share of the lower classes' rows that A gets, and of the upper classes' rows that B gets.
    lams : int
        Points of the path from A (0) to B (1), ends included, without correction.
    corrected_lams : int, optional
        Points of the path with BatchNorm reset and with REPAIR. Default: ``lams`` for the mlp and on a GPU,
        otherwise about a quarter, because each point costs passes over calibration images.
    calibration_images : int
        Training images, without their labels, for the corrections in the middle (at most all).
    curve_calibration_images : int
        The same for the other points of the path.
    corrections : tuple of str, optional
        Names of ``disjoint_bench.CORRECTIONS``. Default: all that the network can have.
    ends : tuple of str
        Networks to train: ``a`` and ``b``, ``all``, or all three. With ``all`` alone nothing is merged: its row can
        join the results of another run, see ``disjoint_join``.
    minutes : float, optional
        Instead of ``epochs``: as many as fit into a run of this length, by a pace that is measured first.
    augment : str
        One of ``augment.AUGMENTATIONS``, where the data set is augmented.
    compile : bool
        Compile networks for training.
    precision : str
        One of ``acceleration.PRECISIONS``, of the trainings; measuring is in bfloat16 on a GPU alone.
    output : Path
        Folder for ``results.json``, plots, page, trained ends (``ends/``) and finished seeds (``partial/``).
    """

    dataset: str
    path: Path | None = None
    model: str | None = None
    width: int | None = None
    norm: str = "batch"
    epochs: int | None = None
    seeds: Sequence[int] = (0,)
    held: float = 0.2
    lams: int = 25
    device: str = "auto"
    output: Path = Path("disjoint")
    calibration_images: int = 5000
    command: str = ""
    corrected_lams: int | None = None
    curve_calibration_images: int = 1000
    matching: str = "weight"
    corrections: tuple[str, ...] | None = None
    ends: tuple[str, ...] = END_NAMES
    minutes: float | None = None
    augment: str = "shift"
    compile: bool = False
    precision: str = "auto"


def check_options(options: DisjointOptions) -> None:
    """Refuse what cannot be met.

    Raises
    ------
    UsageError
        With the option, what was expected and what came.
    """
    if options.dataset not in CATALOGUE:
        raise UsageError(f"data set: expected one of {', '.join(CATALOGUE)}; got {options.dataset!r}")
    if options.model is not None and options.model not in RECIPES:
        raise UsageError(f"--model: expected one of {', '.join(RECIPES)}; got {options.model!r}")
    if options.matching not in METHODS:
        raise UsageError(f"--matching: expected one of {', '.join(METHODS)}; got {options.matching!r}")
    if options.norm not in ("batch", "layer"):
        raise UsageError(f"--norm: expected one of batch, layer; got {options.norm!r}")
    if options.ends not in ENDS:
        raise UsageError(f"--ends: expected one of {'; '.join(map(','.join, ENDS))}; got {','.join(options.ends)!r}")
    if options.augment not in AUGMENTATIONS:
        raise UsageError(f"--augment: expected one of {', '.join(AUGMENTATIONS)}; got {options.augment!r}")
    if options.augment != DisjointOptions.augment and not CATALOGUE[options.dataset][4]:
        raise UsageError(f"--augment: {options.dataset} is not augmented; leave --augment {options.augment} out")
    if options.precision not in PRECISIONS:
        raise UsageError(f"--precision: expected one of {', '.join(PRECISIONS)}; got {options.precision!r}")
    if options.minutes is not None and options.epochs is not None:
        raise UsageError(f"--minutes: expected without --epochs, which it plans; got both {options.epochs} and it")
    if options.minutes is not None and not options.minutes > 0:
        raise UsageError(f"--minutes: expected a positive number; got {options.minutes:g}")
    if options.corrections is not None:
        check_corrections(options)
    if not options.seeds:
        raise UsageError("--seeds: expected at least one")
    if not 0 < options.held < 1:
        raise UsageError(f"--held: expected a share between 0 and 1, both excluded; got {options.held}")
    counts = {
        "--lams": (options.lams, 2),
        "--corrected-lams": (options.corrected_lams, 2),
        "--epochs": (options.epochs, 1),
        "--width": (options.width, 1),
        "--calibration": (options.calibration_images, 1),
        "curve_calibration_images": (options.curve_calibration_images, 1),
    }
    for option, (count, least) in counts.items():
        if count is not None and count < least:
            raise UsageError(f"{option}: expected at least {least}; got {count}")
    if any(seed < 0 for seed in options.seeds):
        raise UsageError(f"--seeds: expected numbers from 0; got {min(options.seeds)}")


def end_configs(options: DisjointOptions, data: Dataset, seed: int = 0) -> list[EndConfig]:
    """What decides the weights of A, B and the model of all data."""
    model, epochs = DEFAULTS[options.dataset]
    model = options.model or model
    return [
        EndConfig(
            dataset=options.dataset,
            source=data.source,
            held=options.held if end != "all" else 0.0,  # it has no share, and one file serves all splits
            model=model,
            width=options.width or DEFAULT_WIDTHS[model],
            norm=options.norm,
            epochs=options.epochs or epochs,
            seed=seed,
            end=end,
            augment=options.augment,
            compile=options.compile,
            precision=options.precision,
        )
        for end in END_NAMES
        if end in options.ends
    ]


def effort_of(options: DisjointOptions, model: str, device: torch.device) -> Effort:
    """How finely a seed is measured: on a GPU, and for the mlp, every point of the path is corrected too."""
    corrected = options.corrected_lams
    if corrected is None:
        cheap = model == "mlp" or device.type == "cuda"
        corrected = options.lams if cheap else max(3, 2 * ((options.lams - 1) // 8) + 1)  # odd: with the middle
    return Effort(
        lams=options.lams,
        corrected_lams=corrected,
        calibration_images=options.calibration_images,
        curve_calibration_images=min(options.curve_calibration_images, options.calibration_images),
        matching=options.matching,
        corrections=options.corrections,
    )


def check_corrections(options: DisjointOptions) -> None:
    """Refuse corrections that are unknown, or that the network cannot have."""
    model = options.model or DEFAULTS[options.dataset][0]
    normalised = model != "mlp" and options.norm == "batch"
    known = [name for name in CORRECTIONS if normalised or name != "reset"]
    unknown = [name for name in options.corrections or () if name not in known]
    if unknown:
        raise UsageError(f"--corrections: expected some of {', '.join(known)} for this network; got {unknown[0]!r}")


def parse_corrections(text: str) -> tuple[str, ...] | None:
    """Read the names of corrections, ``none`` or ``all``; whether the network can have them is checked later.

    >>> parse_corrections("repair,reset"), parse_corrections("none"), parse_corrections("all")
    (('repair', 'reset'), (), None)
    """
    if text in ("all", "none"):
        return None if text == "all" else ()
    names = [word.strip() for word in text.split(",") if word.strip()]
    return tuple(dict.fromkeys("reset" if name == "reset-batchnorm" else name for name in names))
