"""Git Re-Basin's Section 5.4: two networks trained on disjoint, skewed halves, and everything between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import UsageError
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.disjoint_bench import Effort
from fedrebasin.simulations.disjoint_options import DisjointOptions, check_options, effort_of, end_configs
from fedrebasin.simulations.disjoint_page import render
from fedrebasin.simulations.disjoint_seed import measure_seed
from fedrebasin.simulations.ends import EndConfig, disjoint_halves, trained_end
from fedrebasin.simulations.kept import measured_once
from fedrebasin.simulations.results import load_results, provenance, save_results
from fedrebasin.simulations.training import RECIPES, select_device

Progress = Callable[[str], None]


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
    check_options(options)
    device = select_device(options.device)
    data = load_dataset(options.dataset, None if options.path is None else str(options.path))
    ends = end_configs(options, data)
    effort = effort_of(options, ends[0].model, device)
    config = describe(ends[0], effort, data, device)
    make_folder(options.output)
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


def make_folder(folder: Path) -> None:
    """Find out before hours of training that nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output: expected a folder that can be written; {folder}: {error.strerror}") from error


def describe(end: EndConfig, effort: Effort, data: Dataset, device: torch.device) -> dict[str, Any]:
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
    return measured_once(
        options.output / "partial" / f"seed-{seed}.json",
        config,
        lambda: _measure(options, data, seed, effort, device, progress),
        label=f"seed {seed}",
        progress=progress,
    )


def _measure(
    options: DisjointOptions, data: Dataset, seed: int, effort: Effort, device: torch.device, progress: Progress
) -> dict[str, Any]:
    half_a, half_b = disjoint_halves(data.train_labels, data.classes, options.held)
    rows = {"a": half_a, "b": half_b, "all": torch.arange(len(data.train_labels))}
    states: dict[str, dict[str, Tensor]] = {}
    seconds: dict[str, float] = {}
    for end in end_configs(options, data, seed):
        folder = options.output / "ends"
        states[end.end], seconds[end.end] = trained_end(
            end, data, rows[end.end], folder, device=device, progress=progress
        )
    started = time.perf_counter()
    result = measure_seed(
        data, states, rows, end=end_configs(options, data, seed)[0], effort=effort, device=device, progress=progress
    )
    result["seconds"] = {"training": seconds, **result["seconds"], "measuring": time.perf_counter() - started}
    return result
