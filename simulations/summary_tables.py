"""The tables of a comparison, from its results alone."""

from __future__ import annotations

from collections import Counter

from fedrebasin.simulations.alone import epochs_alone
from fedrebasin.simulations.competitors import corrections_of, label_of
from fedrebasin.simulations.report import Table
from fedrebasin.simulations.results import summarise
from fedrebasin.simulations.settings import Settings
from fedrebasin.simulations.summary import Results, baseline_rows, by_round, megabytes, percent, plain, strategies
from fedrebasin.simulations.summary_words import spread_note
from fedrebasin.strategies.selection import CLIENT, names_of_candidates


def round_table(results: Results, key: str, caption: str, *, as_percent: bool) -> Table:
    """A row for each strategy, a column for each round."""
    last = results["settings"]["rounds"]
    names = strategies(results)
    show = percent if as_percent else plain
    rows = [
        [label_of(name), *(show(by_round(results, name, key, number)) for number in range(last + 1))] for name in names
    ]
    columns = ["Strategy", "Start", *(f"Round {number}" for number in range(1, last + 1))]
    ours = [index for index, name in enumerate(names) if "rebasin" in name]
    return Table(caption, columns, rows, note=spread_note(results), highlight=ours)


def baseline_table(results: Results) -> Table:
    """What the clients are worth without a merge."""
    rows = [[name, percent(accuracies), plain(losses)] for name, accuracies, losses in baseline_rows(results)]
    epochs = epochs_alone(Settings(**results["settings"]), results["nodes"])
    if results["settings"]["start"] == "apart":
        note = "Of the clients' own models of their first round"
    else:
        note = "Of clients that train alone, each from its own initialisation"
    note += (
        f" ({epochs} epochs). The ensemble averages the logits of all clients, at as many times the cost of a "
        "prediction; the model of all data trained for as many epochs as each client, on everybody's rows."
    )
    return Table("Baselines on the test images", ["Model", "Accuracy, %", "Loss"], rows, note=note)


def alignment_table(results: Results) -> Table | None:
    """What alignment moved and what it cost, for the strategies that align."""
    keys = {"moved": "rebasin-moved-fraction", "gain": "rebasin-objective-gain", "seconds": "rebasin-seconds"}
    rows = []
    for name in strategies(results):
        for number in range(1, results["settings"]["rounds"] + 1):
            values = {key: by_round(results, name, metric, number) for key, metric in keys.items()}
            if None in values["moved"]:
                continue
            cells = [
                percent(values["moved"]),
                plain(values["gain"]),
                plain(values["seconds"]),
                _kept(results, name, number),
            ]
            rows.append([label_of(name), str(number), *cells])
    columns = ["Strategy", "Round", "Units moved, %", "Gain of the objective", "Seconds", "Model kept"]
    if all(row[-1] == "" for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("Alignment", columns, rows) if rows else None


def _kept(results: Results, strategy: str, number: int) -> str:
    """The models that the selection kept in a round, by seeds, or nothing where none was made."""
    names = (*names_of_candidates(corrections_of(strategy, results["settings"]["correction"])), CLIENT)
    places = [place for place in by_round(results, strategy, "rebasin-selected", number) if place is not None]
    kept = Counter(names[int(place)] for place in places)
    if len(places) == 1:
        return next(iter(kept))
    return ", ".join(f"{name} {count} of {len(places)}" for name, count in kept.most_common())


def bytes_table(results: Results) -> Table | None:
    """Accuracy by bytes sent, where they were counted."""
    last = results["settings"]["rounds"]
    rows = []
    for name in strategies(results):
        cells = []
        for number in range(1, last + 1):
            sent = megabytes(results, name, number)
            if sent is None:
                return None
            cells.append(f"{percent(by_round(results, name, 'accuracy', number))} at {summarise(sent)[0]:.2f}")
        rows.append([label_of(name), *cells])
    columns = ["Strategy", *(f"Round {number}" for number in range(1, last + 1))]
    note = "Millions of bytes of models and queries, to the nodes and back, from the first round on; mean over seeds."
    return Table("Test accuracy, %, at MB sent", columns, rows, note=note)


def presence_table(results: Results) -> Table | None:
    """Which nodes replied in which round, where it was not all of them."""
    settings, rows = results["settings"], []
    if settings["start"] in ("apart", "common") and not settings.get("absent"):
        return None
    for part in results["partition"]:
        run = next(run for run in results["runs"] if run["seed"] == part["seed"])
        there = [[node["node"] for node in row["nodes"]] for row in run["rounds"][1:]]
        rows.append([f"seed {part['seed']}", *(" ".join(map(str, nodes)) for nodes in there)])
    columns = ["Nodes, from 0", *(f"Round {number}" for number in range(1, settings["rounds"] + 1))]
    return Table("Who replied, the same for every strategy", columns, rows)


def node_table(results: Results) -> Table:
    """The rows of each class at each node, first seed."""
    first = results["partition"][0]
    counts = first["rows_of_class"]
    classes = len(counts[0])
    shown = range(classes) if classes <= 10 else range(0)
    columns = ["Node", "Rows", *(f"class {label}" for label in shown)]
    rows = [[str(node), str(sum(row)), *(str(row[label]) for label in shown)] for node, row in enumerate(counts)]
    return Table(f"Training rows of each node, seed {first['seed']}", columns, rows)
