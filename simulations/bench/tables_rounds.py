"""The README's tables of benches that play several rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.summary import percent, plain

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


def last_round(result: Result) -> tuple[Sequence[str], Rows]:
    """``local_optimizer.py --long``: accuracy after some rounds, of the average and corrected, and the last loss."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        how = "FedAvg" if row["when"] == "never" else f"**{row['correction']} in that round alone**"
        found.setdefault((row["network"], row["optimizer"], how), []).append(row)
    rows = []
    for where, own in found.items():
        cells = [percent([row["accuracy"][place] for row in own]) for place in range(len(result["rounds"]))]
        rows.append([*where, *cells, plain([row["loss"][-1] for row in own])])
    last = result["rounds"][-1]
    rounds = [f"after {number} rounds" for number in result["rounds"]]
    return ["network", "local training", "model", *rounds, f"test loss after {last}"], rows


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


TABLES = {"last-round": last_round, "local-optimizer": local_optimizer, "widths-rounds": widths_rounds}
