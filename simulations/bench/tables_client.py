"""The README's tables of cost: the server's with the work on the client, and that of corrections; and SecAgg+."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.summary import percent

Result = Mapping[str, Any]
Rows = list[list[str]]


def secure(result: Result) -> tuple[Sequence[str], Rows]:
    """``secure.py``: test accuracies after one round, and of the models that went into it."""
    rows = result["rows"]
    labels = {
        "secure-plain": "SecAgg+, FedAvg",
        "secure-aligned-to-random": "SecAgg+, **rebasin_mod**, a random model broadcast",
        "secure-aligned-to-trained": "SecAgg+, **rebasin_mod**, a trained model broadcast",
        "broadcast-trained": "the trained model that is broadcast",
    }
    lines = [[label, percent([row[key] for row in rows])] for key, label in labels.items()]
    alone = [max(row["clients-alone"]) for row in rows]
    return ["one round", "test accuracy %"], [*lines, ["best client alone", percent(alone)]]


def server_cost(result: Result) -> tuple[Sequence[str], Rows]:
    """``client_side.py``: seconds, CPU seconds and memory of one ``aggregate_train``."""
    columns = "replies|server|seconds|CPU seconds|peak above the replies|CPU seconds of the mod, on each client".split(
        "|"
    )
    lines = []
    for row in result["rows"]:
        client = f"{row['mod-cpu-seconds']:.2g}" if "mod" in row["method"] else "-"
        peak = f"{row['peak-mb']:.0f} MB"
        seconds = f"{row['seconds']:.3g}", f"{row['cpu-seconds']:.3g}"
        lines.append([f"{row['replies']}, {row['kind']}", row["method"], *seconds, peak, client])
    return columns, lines


def correction_cost(result: Result) -> tuple[Sequence[str], Rows]:
    """``corrections.py``: seconds of corrections beside an evaluation of the three models on the same images."""
    columns = "network, images|job|seconds|CPU seconds|times the evaluation".split("|")
    lines = []
    for row in result["rows"]:
        seconds = f"{row['seconds']:.3g}", f"{row['cpu-seconds']:.3g}", f"{row['times-evaluation']:.2f}"
        lines.append([f"{row['model']}, {row['images']:,}", row["job"], *seconds])
    return columns, lines
