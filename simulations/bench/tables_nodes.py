"""The README's tables of nodes whose networks differ: other heads."""

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
