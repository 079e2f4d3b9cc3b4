"""Git Re-Basin's Section 5.4: two networks trained on disjoint, skewed halves, and everything between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import UsageError
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.devices import usable_device
from fedrebasin.simulations.disjoint_bench import Bench, Effort
from fedrebasin.simulations.disjoint_join import join_results
from fedrebasin.simulations.disjoint_options import DisjointOptions, check_options, effort_of, end_configs
from fedrebasin.simulations.disjoint_page import render
from fedrebasin.simulations.disjoint_seed import ON_PATH, measure_alone, measure_seed
from fedrebasin.simulations.ends import EndConfig, disjoint_halves, trained_end
from fedrebasin.simulations.kept import measured_once
from fedrebasin.simulations.named_data import load_named
from fedrebasin.simulations.output_folder import check_same_run
from fedrebasin.simulations.report import drawn
from fedrebasin.simulations.results import load_experiment, provenance, save_results
from fedrebasin.simulations.time_plan import (
    TimePlan,
    count_layers,
    epochs_that_fit,
    measure_pace,
    plan_once,
    work_after_training,
)
from fedrebasin.simulations.training import RECIPES

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
        For an option that cannot be met, before anything is written; for ``minutes`` that are too few, before
        anything is trained.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin: Merging models modulo permutation symmetries", Section 5.4.
    """
    started = time.time()
    check_options(options)
    device = usable_device(options.device)
    data = load_named(options.dataset, options.path)
    if options.minutes is not None:
        _check_folder(options, data, device)
        make_folder(options.output)
        options = replace(options, epochs=_planned_epochs(options, data, device, started, progress), minutes=None)
    ends = end_configs(options, data)
    effort = effort_of(options, ends[0].model, device)
    config = describe(ends[0], effort, data, device)
    _check_folder(options, data, device)
    make_folder(options.output)
    measured = []
    for seed in dict.fromkeys(options.seeds):
        measured.append(_finished_seed(options, data, seed, effort, config, device, progress))
    facts = provenance(options.command or f"fedrebasin reproduce disjoint {options.dataset}", options.seeds, started)
    facts["training-seconds"] = round(sum(sum(one["seconds"]["training"].values()) for one in measured), 1)
    results = {"experiment": "disjoint", "config": config, "seeds": measured, "provenance": facts}
    save_results(options.output / "results.json", results)
    if options.ends == ("all",):
        progress("there is nothing to draw; --redraw joins this row to the results of a run of both ends")
        return options.output / "results.json"
    return redraw(options.output / "results.json", options.output, progress)


def redraw(
    results: Path,
    folder: Path,
    progress: Progress = print,
    more: Sequence[Path] = (),
    *,
    dataset: str | None = None,
) -> Path:
    """Draw plots and page of a finished run again from its ``results.json`` alone.

    Parameters
    ----------
    more : sequence of Path
        Results of further runs whose rows join the first's; ``folder`` then gets the joined ``results.json`` too.
    dataset : str, optional
        The data set that the results have to be of.

    Returns
    -------
    Path
        The page; or ``results`` itself where matplotlib or jinja2 is missing, with a line to ``progress``.

    Raises
    ------
    UsageError
        If a file holds other results, or ``folder`` those of another run.
    """
    found, *others = [load_experiment(path, "disjoint", dataset) for path in (results, *more)]
    if not all("aligned" in seed["rows"] for seed in found["seeds"]):
        raise UsageError(f"--redraw: expected results of both ends in the first file; {results} has none of a merge")
    if (folder / "results.json").exists():
        check_same_run(folder, {"experiment": "disjoint"}, found["config"], seeds=found["provenance"]["seeds"])
    if more:
        found = join_results([found, *others])
        results = folder / "results.json"
        save_results(results, found)
    return drawn(lambda: render(found, folder), results, progress)


def make_folder(folder: Path) -> None:
    """Find out before hours of training that nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output: expected a folder that can be written; {folder}: {error.strerror}") from error


def _check_folder(options: DisjointOptions, data: Dataset, device: torch.device) -> None:
    end = end_configs(options, data)[0]
    config = describe(end, effort_of(options, end.model, device), data, device)
    if options.minutes is not None:
        del config["epochs"]  # they are not planned yet
    check_same_run(options.output, {"experiment": "disjoint"}, config, seeds=options.seeds)


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
    ends = end_configs(options, data, seed)
    for end in ends:
        folder = options.output / "ends"
        states[end.end], seconds[end.end] = trained_end(
            end, data, rows[end.end], folder, device=device, progress=progress
        )
    started = time.perf_counter()
    if "a" in states:
        result = measure_seed(data, states, rows, end=ends[0], effort=effort, device=device, progress=progress)
    else:
        result = measure_alone(data, states["all"], end=ends[0], effort=effort, device=device)
    result["seconds"] = {"training": seconds, **result["seconds"], "measuring": time.perf_counter() - started}
    paces = {end.end: end.epochs * len(rows[end.end]) / max(seconds[end.end], 1e-3) for end in ends}
    result["images-per-second"] = {name: round(pace) for name, pace in paces.items()}
    return result


def _planned_epochs(
    options: DisjointOptions, data: Dataset, device: torch.device, started: float, progress: Progress
) -> int:
    assert options.minutes is not None
    minutes, ends = options.minutes, end_configs(options, data)
    effort = effort_of(options, ends[0].model, device)
    facts = describe(ends[0], effort, data, device)
    del facts["epochs"]

    def make() -> TimePlan:
        half = torch.arange(len(data.train_labels) // 2)
        pace = measure_pace(ends[0], data, half, device)
        after = 0.0
        if "a" in options.ends:
            bench = Bench(data, ends[0], effort, device)
            chosen = [name for name in bench.corrections if name]
            on_path = [name for name in chosen if name in ON_PATH]
            images = len(bench.labels["test"]) + len(bench.labels["train"])
            after = work_after_training(effort, count_layers(bench.net), chosen, on_path, images=images) / pace
        trained = len(data.train_labels) * (("a" in options.ends) + ("all" in options.ends))
        seeds = len(set(options.seeds))
        spent = time.time() - started
        epochs = epochs_that_fit(minutes, pace, trained * seeds, after * seeds, spent)
        return TimePlan(minutes, epochs, pace, after * seeds)

    facts |= {"minutes": minutes, "ends": options.ends, "seeds": list(options.seeds)}
    return plan_once(options.output / "plan.json", facts, make, progress).epochs
