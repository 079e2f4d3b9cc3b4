"""Tables, plots and the page of a comparison, from its results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrebasin.matching.methods import METHODS
from fedrebasin.simulations.competitors import label_of
from fedrebasin.simulations.disjoint_numbers import DATASETS
from fedrebasin.simulations.report import Picture, Section, Table, write_report
from fedrebasin.simulations.results import summarise
from fedrebasin.simulations.round_plots import save_rounds

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
    for name, key in ((f"ensemble of {results['nodes']} clients", "ensemble"), ("trained on all data", "all_data")):
        rows.append((name, [entry[key]["accuracy"] for entry in entries], [entry[key]["loss"] for entry in entries]))
    return rows


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
    return Table(caption, columns, rows, note=_spread_note(results), highlight=ours)


def baseline_table(results: Results) -> Table:
    """What the clients are worth without a merge."""
    rows = [[name, percent(accuracies), plain(losses)] for name, accuracies, losses in baseline_rows(results)]
    note = (
        "After round 1. The ensemble averages the logits of all clients, at as many times the cost of a prediction; "
        "the model of all data trained for as many epochs as each client, on everybody's rows."
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
            rows.append(
                [label_of(name), str(number), percent(values["moved"]), plain(values["gain"]), plain(values["seconds"])]
            )
    columns = ["Strategy", "Round", "Units moved, %", "Gain of the objective", "Seconds"]
    return Table("Alignment", columns, rows) if rows else None


def node_table(results: Results) -> Table:
    """The rows of each class at each node, first seed."""
    first = results["partition"][0]
    counts = first["rows_of_class"]
    classes = len(counts[0])
    shown = range(classes) if classes <= 10 else range(0)
    columns = ["Node", "Rows", *(f"class {label}" for label in shown)]
    rows = [[str(node), str(sum(row)), *(str(row[label]) for label in shown)] for node, row in enumerate(counts)]
    return Table(f"Training rows of each node, seed {first['seed']}", columns, rows)


def _spread_note(results: Results) -> str:
    n = len(results["partition"])
    start = "Start is the random model that the server sends; with clients that start apart nobody trains from it. "
    start = start if results["settings"]["start"] == "apart" else "Start is the model that the server sends first. "
    return start + (f"Mean ± standard deviation over {n} seeds." if n > 1 else f"One seed ({_seeds(results)}).")


def _seeds(results: Results) -> str:
    return ", ".join(str(part["seed"]) for part in results["partition"])


def question_of(results: Results) -> str:
    """What the run asks."""
    settings = results["settings"]
    nodes, data, partition = results["nodes"], results["data"]["name"], settings["partition"]
    if settings["start"] == "apart":
        begin = (
            f"{nodes} nodes train a network on their own part of {data} ({partition}), each from its own random start"
        )
        return f"{begin}, for {_epochs(settings['epochs'])}, and then send it. What does each strategy make of them?"
    return (
        f"{nodes} nodes train on their own part of {data} ({partition}), from one common start, "
        f"{_epochs(settings['epochs'])} in round 1. Does alignment change what each strategy makes of them?"
    )


def _epochs(number: int) -> str:
    return f"{number} epoch" + ("s" if number != 1 else "")


def answer_of(results: Results) -> str:
    """The numbers that answer it, in one or two sentences, whoever wins."""
    last = results["settings"]["rounds"]
    names = strategies(results)
    rounds = [1, last] if last > 1 else [1]
    said = []
    for number in rounds:
        parts = [f"{label_of(name)} {percent(by_round(results, name, 'accuracy', number))}" for name in names]
        said.append(f"Test accuracy in % after round {number}: {', '.join(parts)}.")
    baselines = [f"{name} {percent(accuracies)}" for name, accuracies, _ in baseline_rows(results)]
    if baselines:
        said.append(f"For comparison: {', '.join(baselines)}.")
    return " ".join(said)


def _plot(results: Results, folder: Path, key: str, title: str, ylabel: str) -> Path:
    numbers = range(1, results["settings"]["rounds"] + 1)
    stats = {
        label_of(name): [summarise(by_round(results, name, key, number)) for number in numbers]
        for name in strategies(results)
    }
    hlines = [
        (name, summarise(accuracies if key == "accuracy" else losses)[0])
        for name, accuracies, losses in baseline_rows(results)
    ]
    path = folder / f"{key}.png"
    title = f"{DATASETS[results['data']['name']]}: {title}"
    save_rounds(path, title, ylabel, stats, hlines, percent=key == "accuracy")
    return path


def write_page(results: Results, folder: Path) -> None:
    """Write ``accuracy.png``, ``loss.png`` and ``report.html`` into ``folder``."""
    settings = results["settings"]
    accuracy = _plot(results, folder, "accuracy", "test accuracy by round", "test accuracy")
    loss = _plot(results, folder, "loss", "test loss by round", "cross-entropy")
    sections: list[Section] = [
        round_table(results, "accuracy", "Test accuracy, %", as_percent=True),
        Picture("Accuracy on the test images after each round", accuracy),
        Picture("Loss on the test images after each round", loss),
        round_table(results, "loss", "Test loss", as_percent=False),
    ]
    if results["baselines"]:
        sections.insert(1, baseline_table(results))
    alignment = alignment_table(results)
    if alignment is not None:
        sections.append(alignment)
    sections += [node_table(results), _method(results)]
    write_report(
        folder / "report.html",
        title=f"{results['data']['name']}: {results['nodes']} nodes, start {settings['start']}",
        question=question_of(results),
        answer=answer_of(results),
        sections=sections,
        provenance=results["provenance"],
    )


def _method(results: Results) -> str:
    settings = results["settings"]
    network = f"Network: {settings['model']}, width {settings['width']}"
    network += "" if settings["model"] == "mlp" else f", {settings['norm']} norm"
    local = f"{_epochs(settings['epochs'])} in round 1 and {_epochs(settings['later_epochs'])} in each later round"
    text = f"{network}. Each client trains {local}. All strategies ran in one run of Flower's simulation runtime."
    if settings["start"] == "apart":
        text += (
            " FedAvg from a common start trains for the same epochs, but from the one model that the server sent."
            " In round 1 apart nothing that a server sends enters a client's training, so each client was trained once "
            "and every strategy merged the same weights. FedProx's term is off in that round."
        )
    names = strategies(results)
    used = {name.partition("+")[2] or settings["correction"] for name in names if "rebasin" in name} - {"none"}
    if any(name.startswith("federated-") for name in used):
        text += f" Federated corrections used up to {settings['calibration']} of each client's own training images."
    if not all(name.startswith("federated-") for name in used):
        text += f" Corrections used {settings['calibration']} training images without labels on the server."
    if settings.get("select", "none") != "none":  # files of earlier versions have no such setting
        text += (
            " Re-basin strategies kept the best of each round's models by agreement with the clients' ensemble, on a "
            f"quarter of {settings['calibration']} training images that no correction used."
        )
    method = METHODS[settings["matching"]]
    if method.inputs:
        labels = "their labels" if method.targets else "no labels"
        name = settings["matching"].capitalize()
        text += f" {name} matching used {settings['calibration']} training images and {labels}."
    if any(name.endswith(("fedadam", "fedyogi", "fedadagrad")) for name in names):
        text += f" Server learning rate of the adaptive optimizers: {settings['server_lr']:g}."
    if "fedprox" in " ".join(names):
        text += f" FedProx's mu: {settings['proximal_mu']:g}."
    return text
