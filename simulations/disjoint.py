"""Git Re-Basin's Section 5.4: two networks trained on disjoint, skewed halves, and everything between them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedrebasin
from fedrebasin.errors import UsageError
from fedrebasin.matching.methods import METHODS
from fedrebasin.simulations.data import CATALOGUE, Dataset, load_dataset
from fedrebasin.simulations.disjoint_page import render
from fedrebasin.simulations.disjoint_seed import Effort, measure_seed
from fedrebasin.simulations.ends import END_NAMES, EndConfig, disjoint_halves, trained_end
from fedrebasin.simulations.models import DEFAULT_WIDTHS
from fedrebasin.simulations.results import load_results, provenance, save_results
from fedrebasin.simulations.training import RECIPES, select_device

Progress = Callable[[str], None]

#: data set -> model and epochs that suit two CPU cores
DEFAULTS = {"digits": ("mlp", 30), "mnist": ("mlp", 10), "cifar10": ("conv", 12), "cifar100": ("resnet20", 20)}
#: the modules of the simulations that decide a seed's numbers
MEASURING = ("data", "models", "training", "ends", "measures", "disjoint_seed")


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


def reproduce_disjoint(options: DisjointOptions, progress: Progress = print) -> Path:
    """Train what is not trained yet, match, measure, and write results, plots and page.

    Returns
    -------
    Path
        The page ``report.html``; or ``results.json`` where matplotlib or jinja2 is missing, see :func:`render`.

    Raises
    ------
    UsageError
        For an option that cannot be met, before anything is written.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin: Merging models modulo permutation symmetries", Section 5.4.
    """
    started = time.time()
    _check(options)
    device = select_device(options.device)
    data = load_dataset(options.dataset, None if options.path is None else str(options.path))
    ends = _end_configs(options, data)
    effort = _effort(options, ends[0].model, device)
    config = _describe(ends[0], effort, data, device)
    _make_folder(options.output)
    measured = []
    for seed in dict.fromkeys(options.seeds):
        measured.append(_finished_seed(options, data, seed, effort, config, device, progress))
    facts = provenance(options.command or f"fedrebasin reproduce disjoint {options.dataset}", options.seeds, started)
    facts["training-seconds"] = round(sum(sum(one["seconds"]["training"].values()) for one in measured), 1)
    results = {"experiment": "disjoint", "config": config, "seeds": measured, "provenance": facts}
    save_results(options.output / "results.json", results)
    return redraw(options.output / "results.json", options.output, progress)


def redraw(results: Path, folder: Path, progress: Progress = print) -> Path:
    """Draw plots and page of a finished run again from its ``results.json`` alone.

    Returns the page; or ``results`` itself where matplotlib or jinja2 is missing, with a line to ``progress``.
    """
    try:
        return render(load_results(results), folder)
    except UsageError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        progress(f"{error}; {results} is complete, and plots and page can be drawn from it later")
        return results


def _make_folder(folder: Path) -> None:
    """Find out before hours of training that nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output: expected a folder that can be written; {folder}: {error.strerror}") from error


def _check(options: DisjointOptions) -> None:
    if options.dataset not in CATALOGUE:
        raise UsageError(f"data set: expected one of {', '.join(CATALOGUE)}; got {options.dataset!r}")
    if options.model is not None and options.model not in RECIPES:
        raise UsageError(f"--model: expected one of {', '.join(RECIPES)}; got {options.model!r}")
    if options.matching not in METHODS:
        raise UsageError(f"--matching: expected one of {', '.join(METHODS)}; got {options.matching!r}")
    if options.norm not in ("batch", "layer"):
        raise UsageError(f"--norm: expected one of batch, layer; got {options.norm!r}")
    if not options.seeds:
        raise UsageError("--seeds: expected at least one")
    if not 0 < options.held < 1:
        raise UsageError(f"--held: expected a share between 0 and 1, both excluded; got {options.held}")
    counts = {
        "--lams": (options.lams, 2),
        "corrected_lams": (options.corrected_lams, 2),
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


def _end_configs(options: DisjointOptions, data: Dataset, seed: int = 0) -> list[EndConfig]:
    model, epochs = DEFAULTS[options.dataset]
    model = options.model or model
    return [
        EndConfig(
            dataset=options.dataset,
            source=data.source,
            held=options.held,
            model=model,
            width=options.width or DEFAULT_WIDTHS[model],
            norm=options.norm,
            epochs=options.epochs or epochs,
            seed=seed,
            end=end,
        )
        for end in END_NAMES
    ]


def _effort(options: DisjointOptions, model: str, device: torch.device) -> Effort:
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
    )


def _describe(end: EndConfig, effort: Effort, data: Dataset, device: torch.device) -> dict[str, Any]:
    """All that decides the numbers of a seed, but for seed, hardware and versions."""
    config = {key: value for key, value in asdict(end).items() if key not in ("end", "seed")}
    recipe = {key: value for key, value in asdict(RECIPES[end.model]).items() if key != "prox"}
    sizes = {"train": len(data.train_labels), "test": len(data.test_labels)}
    return {**config, "recipe": recipe, "images": sizes, **asdict(effort), "device": device.type}


def _finished_seed(
    options: DisjointOptions,
    data: Dataset,
    seed: int,
    effort: Effort,
    config: dict[str, Any],
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """The numbers of one seed: read back if an earlier run finished it with the same config and code."""
    path = options.output / "partial" / f"seed-{seed}.json"
    code = _code()
    if path.exists():
        earlier = load_results(path)
        if (earlier.get("config"), earlier.get("code")) == (config, code):
            progress(f"seed {seed}: measured earlier, used again")
            found: dict[str, Any] = earlier["result"]
            return found
    result = _measure(options, data, seed, effort, device, progress)
    save_results(path, {"config": config, "code": code, "result": result})
    return load_results(path)["result"]  # type: ignore[no-any-return]  # as JSON keeps it, whichever way it came


def _code() -> str:
    """Fingerprint of the code that decides a seed's numbers: a commit says nothing of changes on top of it."""
    core = Path(fedrebasin.__file__).parent
    files = sorted(path for folder in ("", "matching", "corrections", "rules") for path in (core / folder).glob("*.py"))
    files += [Path(__file__).with_name(f"{name}.py") for name in MEASURING]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _measure(
    options: DisjointOptions, data: Dataset, seed: int, effort: Effort, device: torch.device, progress: Progress
) -> dict[str, Any]:
    half_a, half_b = disjoint_halves(data.train_labels, data.classes, options.held)
    rows = {"a": half_a, "b": half_b, "all": torch.arange(len(data.train_labels))}
    states: dict[str, dict[str, Tensor]] = {}
    seconds: dict[str, float] = {}
    for end in _end_configs(options, data, seed):
        folder = options.output / "ends"
        states[end.end], seconds[end.end] = trained_end(
            end, data, rows[end.end], folder, device=device, progress=progress
        )
    started = time.perf_counter()
    result = measure_seed(
        data, states, rows, end=_end_configs(options, data, seed)[0], effort=effort, device=device, progress=progress
    )
    result["seconds"] = {"training": seconds, **result["seconds"], "measuring": time.perf_counter() - started}
    return result
