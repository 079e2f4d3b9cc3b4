"""Tables of how far corrected merges are from the ensemble, over several runs of ``calibration.py`` or ``goals.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.disjoint_options import DEFAULTS
from fedrebasin.simulations.summary import percent, plain

Result = Mapping[str, Any]
CORRECTIONS = ("least-squares", "least-squares+distill")
ENSEMBLES = ("ensemble of logits", "ensemble of probabilities")
COLUMNS = {
    "100 own": [("own", 100)],
    "1,000 own": [("own", 1000)],
    "5,000 own, or all": [("own", 5000), ("own", 1347)],
    "1,000 cifar100": [("cifar100", 1000)],
    "1,000 noise": [("noise", 1000)],
}


def distance(results: Sequence[Result]) -> tuple[Sequence[str], list[list[str]]]:
    """Points of top-1 below the better of both ensembles: least squares / with distillation, by calibration images.

    Runs may share rows; of rows that differ in nothing but the run the first counts.
    """
    scores: dict[tuple[str, int], dict[tuple[str, str, str, int, int], float]] = {}
    ensembles: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for one in results:
        where = _where(one["config"])
        for row in one["references"]:
            both = {name: row["rows"][name]["top1"] for name in ENSEMBLES}
            ensembles.setdefault((where, row["clients"]), {}).setdefault(row["seed"], both)
        for row in one["rows"]:
            key = row["alignment"], row["correction"], row["source"], row["images"], row["seed"]
            scores.setdefault((where, row["clients"]), {}).setdefault(key, row["top1"])
    lines = []
    for (where, clients), found in scores.items():
        goals = ensembles[where, clients]
        best = max(ENSEMBLES, key=lambda name: sum(both[name] for both in goals.values()))
        for alignment in ("plain", "aligned"):
            cells = []
            for sets in COLUMNS.values():
                far = {name: list[float]() for name in CORRECTIONS}
                for (path, correction, source, images, seed), top1 in found.items():
                    if path == alignment and correction in far and (source, images) in sets:
                        far[correction].append(goals[seed][best] - top1)
                cells.append(" / ".join(percent(one) if one else "-" for one in far.values()))
            label = f"{where}, {clients} clients, {alignment}"
            lines.append([f"**{label}**" if alignment == "aligned" else label, *cells])
    return ["points below the better ensemble", *COLUMNS], lines


def attempts(results: Sequence[Result]) -> tuple[Sequence[str], list[list[str]]]:
    """One column for each kind of run and number of clients: loss and top-1 of every attempt, and of both ensembles.

    Runs that differ in nothing but their seeds share a column.
    """
    columns: dict[str, dict[str, list[Result]]] = {}
    for one in results:
        for row in one["rows"]:
            columns.setdefault(_column(one, row), {}).setdefault(row["attempt"], []).append(row)
        for row in one["references"]:
            for name in ENSEMBLES:
                columns[_column(one, row)].setdefault(name, []).append(row["rows"][name])
    names = dict.fromkeys(name for found in columns.values() for name in found if name not in ENSEMBLES)
    lines = [[name, *(_scores(found.get(name)) for found in columns.values())] for name in [*names, *ENSEMBLES]]
    return ["test loss / top-1 %", *columns], lines


def _column(result: Result, row: Result) -> str:
    return f"{_where(result['config'])}, {row['clients']} clients, {result['config']['images']:,} images"


def _scores(rows: Sequence[Result] | None) -> str:
    if rows is None:
        return "-"
    loss, top1 = ([row[key] for row in rows] for key in ("loss", "top1"))
    return f"{plain(loss)} / {percent(top1)}"


def _where(config: Mapping[str, Any]) -> str:
    model = config.get("model") or DEFAULTS[config["dataset"]][0]
    return f"{config['dataset']}, {model} of width {config['width']}"
