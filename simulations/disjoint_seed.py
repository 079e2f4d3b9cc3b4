"""The paper's experiment for one seed, from trained ends to numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedrebasin import interpolate, permute
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.disjoint_bench import Bench, Effort, Logits, State
from fedrebasin.simulations.ends import EndConfig
from fedrebasin.simulations.measures import (
    correct_prior,
    fit_temperature,
    label_prior,
    mean_of_probabilities,
    reliability,
)

#: those that are cheap enough to be followed along the path
ON_PATH = ("", "reset", "repair")


def measure_seed(
    data: Dataset,
    states: Mapping[str, State],
    rows: Mapping[str, Tensor],
    *,
    end: EndConfig,
    effort: Effort,
    device: torch.device,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Match B to A, and measure ends, baselines, merges and paths.

    Parameters
    ----------
    states, rows : mapping
        State dict and training rows of ``"a"``, ``"b"`` and, where there is such a model, ``"all"``.

    Returns
    -------
    dict
        ``rows``: measures of every model, on test and training images; ``curves``: the same along lam;
        ``reliability``; ``matching``; ``similarity`` of A's and B's layers; ``temperatures``; ``seconds``.
    """
    label = f"seed {end.seed}"
    bench = Bench(data, end, effort, device)
    a, b = states["a"], states["b"]
    matching = bench.match(a, b, end.seed)
    progress(f"{label}: matched in {matching.seconds:.1f} s, {matching.moved_fraction:.0%} of the units moved")
    others = {"plain": bench.place(b), "aligned": bench.place(permute(bench.spec, matching.perms, b))}
    a = bench.place(a)

    similarity = bench.similarity(a, others["plain"], others["aligned"])
    started = time.perf_counter()
    logits = baselines(bench, states, rows)
    temperatures: dict[str, float] = {}
    for path, other in others.items():
        logits |= middle(bench, path, a, other)
        temperatures[path] = _cool(bench, path, a, other, logits)
    found: dict[str, Any] = {name: bench.measure(one) for name, one in logits.items()}
    for name in ("plain", "aligned"):
        progress(
            f"{label}: {name}, test loss {found[name]['test']['loss']:.3f}, top-1 {found[name]['test']['top1']:.1%}"
        )
    middle_seconds = time.perf_counter() - started
    started = time.perf_counter()
    curves = {}
    for path, other in others.items():
        for correction in (one for one in ON_PATH if one in bench.corrections):
            name = row_name(path, correction)
            progress(f"{label}: along the path, {name}")
            curves[name] = bench.curve(a, other, correction)
    return {
        "seed": end.seed,
        "rows": found,
        "curves": curves,
        "reliability": {name: reliability(one["test"], bench.labels["test"]) for name, one in logits.items()},
        "temperatures": temperatures,
        "matching": {
            "objective": matching.objective,
            "objective-before": matching.objective_before,
            "moved-fraction": matching.moved_fraction,
            "log10-order": bench.spec.log10_order,
        },
        "similarity": similarity,
        "seconds": {
            "matching": matching.seconds,
            "middle": middle_seconds,
            "curves": time.perf_counter() - started,
        },
    }


def measure_alone(
    data: Dataset, state: State, *, end: EndConfig, effort: Effort, device: torch.device
) -> dict[str, Any]:
    """The row of the model of all data, without any other network, in the form of :func:`measure_seed`."""
    bench = Bench(data, end, effort, device)
    logits = bench.logits(bench.place(state))
    return {
        "seed": end.seed,
        "rows": {end.end: bench.measure(logits)},
        "curves": {},
        "reliability": {end.end: reliability(logits["test"], bench.labels["test"])},
        "seconds": {},
    }


def row_name(path: str, correction: str) -> str:
    """Name of the row or curve.

    >>> row_name("plain", ""), row_name("aligned", "repair")
    ('plain', 'aligned+repair')
    """
    return f"{path}+{correction}" if correction else path


def baselines(bench: Bench, states: Mapping[str, State], rows: Mapping[str, Tensor]) -> dict[str, Logits]:
    """Logits of the given networks, of A and B with their label priors taken off, and of their ensembles."""
    logits = {end: bench.logits(bench.place(state)) for end, state in states.items()}
    parts = ("test", "train")
    for end in ("a", "b"):
        prior = label_prior(bench.data.train_labels[rows[end]], bench.data.classes)
        logits[f"{end}+corrected"] = {part: correct_prior(logits[end][part], prior) for part in parts}
    logits["ensemble-logits"] = {part: (logits["a"][part] + logits["b"][part]) / 2 for part in parts}
    logits["ensemble-probabilities"] = {
        part: mean_of_probabilities([logits["a"][part], logits["b"][part]]) for part in parts
    }
    return logits


def middle(bench: Bench, path: str, a: State, b: State) -> dict[str, Logits]:
    """Logits of the models at lam = 0.5, with every correction of the bench."""
    return {
        row_name(path, correction): bench.logits(bench.merged(a, b, 0.5, correction, bench.effort.calibration_images))
        for correction in bench.corrections
    }


def _cool(bench: Bench, path: str, a: State, b: State, logits: dict[str, Logits]) -> float:
    """Add the average with a temperature to ``logits``, and return the temperature."""
    plain = bench.logits(interpolate(a, b, 0.5), ("calibration",))["calibration"]
    temperature = fit_temperature(plain, bench.labels["calibration"])
    logits[f"{path}+temperature"] = {part: one / temperature for part, one in logits[path].items()}
    return temperature
