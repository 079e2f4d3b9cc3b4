"""The numbers of a comparison and how they are printed, from its results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.results import summarise

Results = Mapping[str, Any]
Values = Sequence[float | None]


def percent(values: Values) -> str:
    """Mean and standard deviation of fractions, as percentages with their sign left out.

    >>> percent([0.5, 0.6]), percent([0.5]), percent([None])
    ('55.0 ± 7.1', '50.0', 'not a number')
    """
    return _text(values, 100, 1)


def plain(values: Values) -> str:
    """Mean and standard deviation of losses and the like.

    >>> plain([0.5, 0.7])
    '0.600 ± 0.141'
    """
    return _text(values, 1, 3)


def _text(values: Values, scale: float, digits: int) -> str:
    mean, spread, n = summarise(values)
    if n < len(values) or n == 0:
        return "not a number"
    text = f"{scale * mean:.{digits}f}"
    return f"{text} ± {scale * spread:.{digits}f}" if n > 1 else text


def by_round(results: Results, strategy: str, key: str, server_round: int) -> list[float | None]:
    """One value for each seed."""
    rows = [run["rounds"][server_round] for run in results["runs"] if run["strategy"] == strategy]
    return [row.get(key) for row in rows]


def strategies(results: Results) -> list[str]:
    """The strategies in the order of the command line."""
    return list(dict.fromkeys(run["strategy"] for run in results["runs"]))


def baseline_rows(results: Results) -> list[tuple[str, list[float], list[float]]]:
    """Name, accuracies and losses (one for each seed) of what a merge has to be compared with."""
    entries = results["baselines"]
    if not entries:
        return []
    best = [max(entry["clients"], key=lambda client: client["accuracy"]) for entry in entries]
    corrected = [max(entry["clients"], key=lambda client: client["corrected_accuracy"]) for entry in entries]
    rows = [
        ("best client alone", [c["accuracy"] for c in best], [c["loss"] for c in best]),
        (
            "best client, label prior corrected",
            [c["corrected_accuracy"] for c in corrected],
            [c["corrected_loss"] for c in corrected],
        ),
    ]
    sizes = {len(entry["clients"]) for entry in entries}  # a node that never comes has no model
    ensemble = f"ensemble of {sizes.pop()} clients" if len(sizes) == 1 else "ensemble of those that came"
    for name, key in ((ensemble, "ensemble"), ("trained on all data", "all_data")):
        rows.append((name, [entry[key]["accuracy"] for entry in entries], [entry[key]["loss"] for entry in entries]))
    if "joins" in entries[0]:
        joins = [entry["joins"] for entry in entries]
        rows.insert(0, ("the silo that joins, alone", [c["accuracy"] for c in joins], [c["loss"] for c in joins]))
    return rows


def megabytes(results: Results, strategy: str, server_round: int) -> list[float] | None:
    """Millions of bytes of models, both ways, up to the end of a round: one value for each seed.

    None for files of earlier versions, which did not count them.
    """
    sums = []
    for run in results["runs"]:
        if run["strategy"] == strategy:
            rows = run["rounds"][1 : server_round + 1]
            if any("sent_bytes" not in row for row in rows):
                return None
            sums.append(sum(row["sent_bytes"] + row["received_bytes"] for row in rows) / 1e6)
    return sums
