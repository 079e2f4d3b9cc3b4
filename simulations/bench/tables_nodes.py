"""The README's tables of nodes whose networks differ: other heads, other widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.disjoint_numbers import spread_text
from fedrebasin.simulations.summary import percent

Result = Mapping[str, Any]
Rows = list[list[str]]


def heads(result: Result) -> tuple[Sequence[str], Rows]:
    """``heads.py``: loss and accuracy, means of both tasks, by the layer up to which the trunk is shared."""
    layers = list(dict.fromkeys(row["until"] for row in result["rows"] if row["until"] != "-"))
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        cell = f"{spread_text(row['loss'])} / {percent(row['accuracy'])}"
        cells.setdefault(row["merge"], {}).update(
            dict.fromkeys(layers if row["until"] == "-" else [row["until"]], cell)
        )
    rows = [[f"**{how}**" if how == "zipped" else how, *(own[layer] for layer in layers)] for how, own in cells.items()]
    return ["test loss / top-1 %", *(f"shared up to hidden layer {n}" for n in range(1, len(layers) + 1))], rows


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
