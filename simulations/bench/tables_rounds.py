"""The README's tables of benches that play several rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.summary import percent

Result = Mapping[str, Any]
Rows = list[list[str]]


def local_optimizer(result: Result) -> tuple[Sequence[str], Rows]:
    """``local_optimizer.py``: accuracy of the last round's model, by network, local training and rounds corrected."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in result["rows"]:
        own = found.setdefault((row["network"], row["optimizer"]), {})
        how = "FedAvg" if row["when"] == "never" else f"{row['correction']}, {row['when']}"
        own.setdefault(how, []).append(row["accuracy"][-1])
    columns = list(dict.fromkeys(how for own in found.values() for how in own))
    rows = [[*where, *(percent(own[how]) for how in columns)] for where, own in found.items()]
    return ["network", "local training", *columns], rows


def widths_rounds(result: Result) -> tuple[Sequence[str], Rows]:
    """``widths_rounds.py``: accuracy by round of what a node is sent and makes of it, and of the node alone."""
    last = max(row["round"] for row in result["rows"])
    labels = {"sent": "**sent back by the server**", "trained": "before that, trained in the round", "alone": "alone"}
    rows = []
    for width in result["widths"]:
        for key, label in labels.items():
            cells = []
            for number in range(1, last + 1):
                own = [row for row in result["rows"] if (row["width"], row["round"]) == (width, number)]
                cells.append(percent([row[f"{key}-accuracy"] for row in own]))
            rows.append([f"width {width}", label, *cells])
    return ["node", "test accuracy %", *(f"round {number}" for number in range(1, last + 1))], rows


TABLES = {"local-optimizer": local_optimizer, "widths-rounds": widths_rounds}
