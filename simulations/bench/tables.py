"""The README's tables of the benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.simulations.bench import selection_tables, tables_rounds
from fedrebasin.simulations.bench.clients import default_split
from fedrebasin.simulations.bench.tables_client import correction_cost, secure, server_cost
from fedrebasin.simulations.bench.tables_nodes import heads
from fedrebasin.simulations.disjoint_numbers import spread_text
from fedrebasin.simulations.summary import percent, plain
from fedrebasin.simulations.sweep_numbers import table as sweep_table

Result = Mapping[str, Any]
Rows = list[list[str]]


def speed(result: Result) -> tuple[Sequence[str], Rows]:
    """``matching.py``: seconds, ratios to the plain algorithm and to the floor, and memory above the two models."""
    columns = ["network, pair", "parameters", "seconds", "plain Algorithm 1", "times faster", "times the floor"]
    memory = all("peak-mb" in row for row in result["rows"])
    rows = []
    for row in result["rows"]:
        gains = f"{row['gain']:,.1f}", f"{statistics.mean(row['plain-gain']):,.1f}"
        seconds = f"{row['seconds']:.3g}", f"{row['plain-seconds']:.3g}"
        ratios = f"{row['speed-up']:.1f}", f"{row['over-floor']:.1f}"
        millions = row["parameters"] / 1e6
        parameters = f"{millions:.0f} M" if millions >= 10 else f"{millions:.2g} M"
        peak = [f"{row['peak-mb']:.0f} MB"] if memory else []
        rows.append([f"{row['network']}, {row['pair']}", parameters, *seconds, *ratios, *gains, *peak])
    return [*columns, "gain", "plain's gain", *(["memory"] if memory else [])], rows


def quality(result: Result) -> tuple[Sequence[str], Rows]:
    """``quality.py``: gains as ratios to the mean over 10 orders, mean and least over the seeds."""
    columns = "network|weights|default|10 starts|plain, best of 10 orders|seconds: default, 10 starts, plain".split("|")
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in result["independent"]:
        groups.setdefault((row["network"], row["weights"]), []).append(row)
    rows = []
    for (network, weights), found in groups.items():
        cells = []
        for key in ("default", "restarts", "plain-best"):
            ratios = [row[key] / row["plain-mean"] for row in found]
            cells.append(f"{statistics.mean(ratios):.3f} (from {min(ratios):.3f})")
        seconds = [
            statistics.median(row[key] for row in found) for key in ("seconds", "restarts-seconds", "plain-seconds")
        ]
        rows.append([network, weights, *cells, ", ".join(f"{one:.2g}" for one in seconds)])
    return columns, rows


def methods(result: Result) -> tuple[Sequence[str], Rows]:
    """``methods.py``: one column a network."""
    networks = list(dict.fromkeys(row["network"] for row in result["rows"]))
    cells = {(row["method"], row["network"]): row for row in result["rows"]}
    best = {name: max(row["mean-gain"] for row in result["rows"] if row["network"] == name) for name in networks}
    rows = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        line = [method]
        for name in networks:
            row = cells[method, name]
            gain = f"{row['mean-gain']:.2f}"
            line.append(f"{f'**{gain}**' if row['mean-gain'] == best[name] else gain} / {row['seconds']:.2g} s")
        rows.append(line)
    return ["gain / seconds", *networks], rows


def many(result: Result) -> tuple[Sequence[str], Rows]:
    """``many.py``: the gain on the first run's models, which all ways share, and median seconds."""
    networks = list(dict.fromkeys(row["network"] for row in result["rows"]))
    cells = {(row["method"], row["network"]): row for row in result["rows"]}
    best = {name: max(row["gain"][0] for row in result["rows"] if row["network"] == name) for name in networks}
    rows = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        line = [method]
        for name in networks:
            row = cells.get((method, name))
            gain = row["gain"][0] if row else 0.0
            text = f"**{gain:.0f}**" if gain == best[name] else f"{gain:.0f}"
            line.append(f"{text} / {row['seconds']:.2g} s" if row else "-")
        rows.append(line)
    return ["gain / seconds", *networks], rows


def growth(result: Result) -> tuple[Sequence[str], Rows]:
    """``many.py``: seconds of merge-many by the number of models."""
    counts = list(dict.fromkeys(row["models"] for row in result["growth"]))
    networks = list(dict.fromkeys(row["network"] for row in result["growth"]))
    cells = {(row["network"], row["models"]): row["seconds"] for row in result["growth"]}
    return ["seconds, merge-many", *(f"{count} models" for count in counts)], [
        [name, *(f"{cells[name, count]:.2g}" if (name, count) in cells else "-" for count in counts)]
        for name in networks
    ]


def clients(result: Result) -> tuple[Sequence[str], Rows]:
    """``wide.py``: seconds a client, by one call and by a loop."""
    columns = "network|clients|seconds each, match_each|seconds each, a loop|times faster".split("|")
    rows = [
        [
            row["network"],
            f"{row['clients']}, {row['kind']}",
            f"{row['seconds-per-client']:.2g}",
            f"{row['loop-seconds-per-client']:.2g}",
            f"{row['ratio']:.1f}",
        ]
        for row in result["clients"]
    ]
    return columns, rows


def own_data(result: Result) -> tuple[Sequence[str], Rows]:
    """``federated.py``: one column a split and way to merge, test loss and accuracy in %."""
    heads = list(dict.fromkeys((row["nodes"], row["partition"], row["merge"]) for row in result["rows"]))
    cells = {(row["nodes"], row["partition"], row["merge"], row["correction"]): row for row in result["rows"]}
    rows = []
    for correction in dict.fromkeys(row["correction"] for row in result["rows"]):
        line = ["no correction" if correction == "-" else correction]
        for head in heads:
            row = cells.get((*head, correction))
            line.append("-" if row is None else f"{plain(row['loss'])} / {percent(row['accuracy'])}")
        rows.append(line)
    columns = [f"{nodes} clients, {partition}, {merge}" for nodes, partition, merge in heads]
    return [f"{result['data']}, {result['model']} of width {result['width']}", *columns], rows


def calibration(result: Result) -> tuple[Sequence[str], Rows]:
    """``calibration.py``: one column for each number of clients, source and number of images.

    Files may share rows; of rows that differ in nothing but the file the first counts.
    """
    cells: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
    most = max(row["images"] for row in result["rows"] if row["source"] == "own")
    fewest = min(row["clients"] for row in result["rows"])
    columns: dict[str, str] = {}
    for row in result["rows"]:
        if row["clients"] > fewest and (row["source"], row["images"]) not in (("own", most), ("", 0)):
            continue  # the file has them
        place = f"{row['clients']} clients, {row['images']:,} {row['source']}"
        own = cells.setdefault((row["alignment"], row["correction"]), {}).setdefault(place, {})
        own.setdefault(row["seed"], row)
        if row["correction"]:
            columns[place] = str(row["clients"])
    rows = []
    for (alignment, correction), places in cells.items():
        path, comma, more = alignment.partition(",")
        label = f"{path} average{comma}{more}" + (f" + {correction}" if correction else "")
        whole = [places.get(column, places.get(f"{clients} clients, 0 ", {})) for column, clients in columns.items()]
        line = [_scores([*own.values()]) for own in whole]
        rows.append([f"**{label}**" if path == "aligned" else label, *line])
    for name in [name for name in result["references"][0]["rows"] if not name.startswith("client ")]:
        found: dict[str, dict[int, Result]] = {clients: {} for clients in columns.values()}
        for one in result["references"]:
            if str(one["clients"]) in found and name in one["rows"]:
                found[str(one["clients"])].setdefault(one["seed"], one["rows"][name])
        rows.append([name, *(_scores([*found[clients].values()]) for clients in columns.values())])
    return ["test loss / top-1 %", *columns], rows


def joint(result: Result) -> tuple[Sequence[str], Rows]:
    """``joint.py``: one column a split; loss and accuracy, as averaged and corrected, CPU seconds, width if grown."""
    columns = list(dict.fromkeys(map(_split, result["rows"])))
    rows = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        line = [f"**{method}**" if method else "plain average"]
        for column in columns:
            own = [row for row in result["rows"] if (_split(row), row["method"]) == (column, method)]
            if not own:
                line.append("-")
                continue
            corrections = dict.fromkeys(row["correction"] for row in own)
            by_correction = [[row for row in own if row["correction"] == name] for name in corrections]
            seeds = max(map(len, by_correction))
            parts = [_scores(few) + _of_seeds(len(few), seeds) for few in by_correction]
            if method:
                parts.append(f"{statistics.mean(row['cpu-seconds'] for row in own):.2g} s")
            if "width" in own[0]:
                parts.append(f"width {statistics.mean(row['width'] for row in own if not row['correction']):,.0f}")
            line.append("; ".join(parts))
        rows.append(line)
    for name in ("best client", "ensemble of logits", "ensemble of probabilities"):
        found = [[one["rows"][name] for one in result["references"] if _split(one) == column] for column in columns]
        rows.append([name, *map(_scores, found)])
    return ["average; corrected; CPU seconds", *(f"{clients} clients, {split}" for clients, split in columns)], rows


def _of_seeds(measured: int, seeds: int) -> str:
    """What a cell says that has fewer seeds than its neighbours (a network grown too wide to be corrected)."""
    return f" ({measured} of {seeds} seeds)" if measured < seeds else ""


def _split(row: Result) -> tuple[int, str]:
    """Clients, and how they hold the data."""
    return row["clients"], row.get("split", default_split(row["clients"]))


def _scores(found: Sequence[Result] | None) -> str:
    if not found:
        return "-"
    loss, top1 = ([row[key] for row in found] for key in ("loss", "top1"))
    return f"{spread_text(loss)} / {percent(top1)}"


def merging(result: Result) -> tuple[Sequence[str], Rows]:
    """``merge.py``: peak memory and seconds of ``fedrebasin merge``, under a limit and without one."""
    columns = "two files of|largest tensor|--memory|peak|seconds|peak without a limit|seconds".split("|")
    rows = []
    for row in result["rows"]:
        cells = [f"{row['file-gb']:.2g} GB each", f"{1e3 * row['largest-tensor-gb']:.0f} MB", row["memory"]]
        for key in ("limited", "unlimited"):
            found = row.get(key)
            cells += [f"{found['peak-gb']:.2f} GB", f"{found['seconds']:.0f}"] if found else ["-", "-"]
        rows.append(cells)
    return columns, rows


def learned(result: Result) -> tuple[Sequence[str], Rows]:
    """``learned.py``: gain, barrier and milliseconds of every start, one column a population."""
    columns = list(dict.fromkeys(row["population"] for row in result["rows"]))
    rows: dict[str, list[str]] = {}
    for row in result["rows"]:
        cell = f"{row['gain']:.2f} / {row['barrier']:.3f} / {row['milliseconds']:.1f} ms"
        rows.setdefault(row["start"], []).append(cell)
    return ["gain / barrier / time of a pair", *columns], [[start, *cells] for start, cells in rows.items()]


TABLES = {
    "learned": learned,
    "heads": heads,
    "merging": merging,
    "calibration": calibration,
    "own-data": own_data,
    "speed": speed,
    "quality": quality,
    "methods": methods,
    "many": many,
    "growth": growth,
    "joint": joint,
    "clients": clients,
    "secure": secure,
    "server-cost": server_cost,
    "correction-cost": correction_cost,
    "sweep": sweep_table,
    **selection_tables.TABLES,
    **tables_rounds.TABLES,
}
