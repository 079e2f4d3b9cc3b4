"""One quantity varied, everything else fixed: from which width, epoch or split on does a merge pay?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.devices import usable_device
from fedrebasin.simulations.disjoint import describe, make_folder
from fedrebasin.simulations.disjoint_options import effort_of, end_configs
from fedrebasin.simulations.ends import disjoint_halves, trained_end
from fedrebasin.simulations.kept import measured_once
from fedrebasin.simulations.named_data import load_named
from fedrebasin.simulations.output_folder import check_same_run
from fedrebasin.simulations.report import drawn
from fedrebasin.simulations.results import load_experiment, provenance, save_results
from fedrebasin.simulations.sweep_options import SweepOptions, check_sweep
from fedrebasin.simulations.sweep_page import render
from fedrebasin.simulations.sweep_point import measure_point

Progress = Callable[[str], None]


def reproduce_sweep(options: SweepOptions, progress: Progress = print) -> Path:
    """Train and measure every value and seed that is not measured yet, and write results, pictures and page.

    Trained ends and finished points are kept in the output folder, so that a run that was killed goes on.

    Returns
    -------
    Path
        The page ``report.html``; or ``results.json`` where matplotlib or jinja2 is missing.

    Raises
    ------
    UsageError
        For an option that cannot be met, before anything is written.
    """
    started = time.time()
    check_sweep(options)
    base = options.base
    device = usable_device(base.device)
    data = load_named(base.dataset, base.path)
    facts = {"experiment": "sweep", "over": options.over, "same-data": options.same_data}
    config = {key: one for key, one in _config(options, data, options.values[0], device).items() if key != options.over}
    check_same_run(base.output, facts, config, seeds=base.seeds, values=options.values)
    make_folder(base.output)
    points = [
        _point(options, data, value, seed, device, progress)
        for value in options.values
        for seed in dict.fromkeys(base.seeds)
    ]
    source = provenance(base.command or f"fedrebasin reproduce sweep {base.dataset}", base.seeds, started)
    source["training-seconds"] = round(sum(sum(point["seconds"]["training"].values()) for point in points), 1)
    results = {**facts, "values": list(options.values), "config": config, "points": points, "provenance": source}
    save_results(base.output / "results.json", results)
    return redraw(base.output / "results.json", base.output, progress)


def redraw(results: Path, folder: Path, progress: Progress = print, *, dataset: str | None = None) -> Path:
    """Draw pictures and page of a finished sweep again from its ``results.json`` alone.

    Returns the page; or ``results`` itself where matplotlib or jinja2 is missing, with a line to ``progress``. Results
    of anything else, or of another data set than ``dataset``, are refused, and so is a ``folder`` of another run.
    """
    found = load_experiment(results, "sweep", dataset)
    if (folder / "results.json").exists():
        facts = {key: found[key] for key in ("experiment", "over", "same-data")}
        seeds, values = found["provenance"]["seeds"], found["values"]
        check_same_run(folder, facts, found["config"], seeds=seeds, values=values)
    return drawn(lambda: render(found, folder), results, progress)


def _config(options: SweepOptions, data: Dataset, value: float, device: torch.device) -> dict[str, Any]:
    at = options.at(value)
    end = end_configs(at, data)[0]
    config = describe(end, effort_of(at, end.model, device), data, device)
    if options.same_data:
        config["held"] = None
    return config


def _point(
    options: SweepOptions, data: Dataset, value: float, seed: int, device: torch.device, progress: Progress
) -> dict[str, Any]:
    label = f"{options.over} {value:g}, seed {seed}"
    kind = "same-data" if options.same_data else "disjoint"
    measured = measured_once(
        options.base.output / "partial" / f"{kind}-{options.over}-{value:g}-seed-{seed}.json",
        _config(options, data, value, device),
        lambda: _measure(options, data, value, seed, device, progress),
        label=label,
        progress=progress,
    )
    found = {name: measured["rows"][name]["test"] for name in ("plain", "aligned")}
    said = ", ".join(f"{name} {one['loss'] or float('nan'):.3f} / {one['top1']:.1%}" for name, one in found.items())
    progress(f"{label}: test loss / top-1 {said}")
    return {"value": value, "seed": seed, **measured}


def _measure(
    options: SweepOptions, data: Dataset, value: float, seed: int, device: torch.device, progress: Progress
) -> dict[str, Any]:
    at = options.at(value)
    ends = {end.end: end for end in end_configs(at, data, seed)}
    everything = torch.arange(len(data.train_labels))
    parts: dict[str, Tensor]
    if options.same_data:
        ends = {"a": ends["all"], "b": replace(ends["all"], end="again")}
        parts = {"a": everything, "b": everything}
    else:
        parts = dict(zip("ab", disjoint_halves(data.train_labels, data.classes, at.held), strict=True))
        parts["all"] = everything
    states, seconds = {}, {}
    for name, end in ends.items():
        states[name], seconds[name] = trained_end(
            end, data, parts[name], options.base.output / "ends", device=device, progress=_quiet(progress)
        )
    result = measure_point(
        data, states, parts, end=ends["a"], effort=effort_of(at, ends["a"].model, device), device=device
    )
    result["seconds"]["training"] = seconds
    return result


def _quiet(progress: Progress) -> Progress:
    """A sweep trains dozens of networks: their epochs are not reported."""

    def report(line: str) -> None:
        if ": epoch " not in line:
            progress(line)

    return report
