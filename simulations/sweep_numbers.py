"""A sweep's numbers by value and row, and its table in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.disjoint_numbers import (
    DATASETS,
    ROWS,
    headline,
    in_precision,
    number,
    per_seed,
    spread_text,
)

Results = Mapping[str, Any]

#: rows that are the better of two models in each seed, and those that are no merge
BEST = {"better-end": "best single client", "better-end+corrected": "best single client, prior corrected"}
LAST = ("ensemble-logits", "all")
BARRIERS = {
    (path, part): f"loss barrier, {path}, {'test' if part == 'test' else 'training'} images"
    for part in ("test", "train")
    for path in ("plain", "aligned")
}


def at(results: Results, value: float) -> Results:
    """The points of one value, in the form of a disjoint experiment's results."""
    return {"seeds": [point for point in results["points"] if point["value"] == value]}


def rows_of(results: Results) -> dict[str, str]:
    """Row of the table -> label; a correction of the prior means nothing where both ends see all the data."""
    first = results["points"][0]["rows"]
    same = results["same-data"]
    merges = {name: label for name, label in ROWS.items() if name in first and name.startswith(("plain", "aligned"))}
    best = {"better-end": "better of the two ends"} if same else BEST
    return {**merges, **best, **{name: ROWS[name] for name in LAST if name in first}}


def losses_and_shares(results: Results, value: float, row: str) -> tuple[list[float], list[float]]:
    """Test loss and top-1 of every seed."""
    seeds = at(results, value)
    return per_seed(seeds, row, "test", "loss"), per_seed(seeds, row, "test", "top1")


def barriers(results: Results, value: float, path: str, part: str) -> list[float]:
    """The loss barrier of every seed along the path without correction."""
    return [number(point["curves"][path][part]["loss-barrier"]) for point in at(results, value)["seeds"]]


def wins(results: Results, value: float, row: str) -> tuple[int, int, int]:
    """Seeds in which the merge beats both ends on test loss, on top-1, and all seeds."""
    losses, shares = losses_and_shares(results, value, row)
    best_losses, best_shares = losses_and_shares(results, value, "better-end")
    lower = sum(ours < best for ours, best in zip(losses, best_losses, strict=True))
    higher = sum(ours > best for ours, best in zip(shares, best_shares, strict=True))
    return lower, higher, len(losses)


def merge_of(results: Results) -> str:
    """The merge that the answer speaks of, as in the disjoint experiment."""
    return headline({"seeds": results["points"]})


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names and rows: a column for each value."""
    values = results["values"]
    rows = []
    for row, label in rows_of(results).items():
        cells = [_cell(*losses_and_shares(results, value, row)) for value in values]
        rows.append([f"**{label}**" if row.startswith("aligned") else label, *cells])
    for (path, part), label in BARRIERS.items():
        cells = [spread_text(barriers(results, value, path, part)) for value in values]
        rows.append([f"**{label}**" if path == "aligned" else label, *cells])
    merge = merge_of(results)
    counted = [wins(results, value, merge) for value in values]
    label = f"seeds in which the {ROWS[merge]} beats both ends: loss, top-1"
    rows.append([label, *(f"{lower}, {higher} of {n}" for lower, higher, n in counted)])
    return [f"{title(results)}: test loss / top-1 %", *(value_text(results["over"], value) for value in values)], rows


def title(results: Results) -> str:
    """Data set and network."""
    config = results["config"]
    parts = [DATASETS[config["dataset"]], config["model"]]
    if "width" in config:
        parts[1] += f" of width {config['width']}"
    if "epochs" in config:
        parts.append(f"{config['epochs']} epochs")
    parts[-1] += in_precision(config)
    if results["same-data"]:
        parts.append("both ends on all the data")
    return ", ".join(parts)


def value_text(over: str, value: float) -> str:
    """A value as readers see it.

    >>> value_text("width", 64), value_text("epochs", 3), value_text("held", 0.05)
    ('width 64', '3 epochs', '5/95')
    """
    if over == "held":
        return f"{100 * value:.3g}/{100 - 100 * value:.3g}"
    return f"width {value:g}" if over == "width" else f"{value:g} epoch" + ("s" if value != 1 else "")


def _cell(losses: Sequence[float], shares: Sequence[float]) -> str:
    return f"{spread_text(losses)} / {spread_text(shares, percent=True)}"
