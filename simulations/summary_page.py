"""Plots and the page of a comparison, from its results alone."""

from __future__ import annotations

from pathlib import Path

from fedrebasin.simulations.competitors import label_of
from fedrebasin.simulations.disjoint_numbers import DATASETS
from fedrebasin.simulations.report import Picture, Section, write_report
from fedrebasin.simulations.results import summarise
from fedrebasin.simulations.round_plots import save_rounds
from fedrebasin.simulations.summary import Results, baseline_rows, by_round, megabytes, strategies
from fedrebasin.simulations.summary_tables import (
    alignment_table,
    baseline_table,
    bytes_table,
    node_table,
    presence_table,
    round_table,
)
from fedrebasin.simulations.summary_words import answer_of, method_of, question_of

Sent = dict[str, list[float]]  # label of a strategy -> millions of bytes up to each round


def _plot(results: Results, path: Path, key: str, title: str, ylabel: str, *, sent: Sent | None = None) -> Path:
    numbers = range(1, results["settings"]["rounds"] + 1)
    stats = {
        label_of(name): [summarise(by_round(results, name, key, number)) for number in numbers]
        for name in strategies(results)
    }
    hlines = [
        (name, summarise(accuracies if key == "accuracy" else losses)[0])
        for name, accuracies, losses in baseline_rows(results)
    ]
    title = f"{DATASETS[results['data']['name']]}: {title}"
    save_rounds(path, title, ylabel, stats, hlines, percent=key == "accuracy", sent=sent)
    return path


def _sent(results: Results) -> Sent | None:
    """Means over seeds of the millions of bytes that were sent up to each round; None where they were not counted."""
    found: Sent = {}
    for name in strategies(results):
        sums = [megabytes(results, name, number) for number in range(1, results["settings"]["rounds"] + 1)]
        if None in sums:
            return None
        found[label_of(name)] = [summarise(one or [])[0] for one in sums]
    return found


def write_page(results: Results, folder: Path) -> None:
    """Write ``report.html`` and its pictures into ``folder``; no accuracy by bytes where they were not counted."""
    settings, sent = results["settings"], _sent(results)
    accuracy = _plot(results, folder / "accuracy.png", "accuracy", "test accuracy by round", "test accuracy")
    loss = _plot(results, folder / "loss.png", "loss", "test loss by round", "cross-entropy")
    sections: list[Section] = [
        round_table(results, "accuracy", "Test accuracy, %", as_percent=True),
        Picture("Accuracy on the test images after each round", accuracy),
        Picture("Loss on the test images after each round", loss),
        round_table(results, "loss", "Test loss", as_percent=False),
    ]
    if results["baselines"]:
        sections.insert(1, baseline_table(results))
    if sent is not None:
        path, title = folder / "accuracy-by-bytes.png", "test accuracy by bytes sent"
        _plot(results, path, "accuracy", title, "test accuracy", sent=sent)
        sections.insert(-1, Picture("Accuracy on the test images by what was sent until then", path))
    optional = (bytes_table(results), alignment_table(results), presence_table(results))
    sections += [table for table in optional if table is not None]
    sections += [node_table(results), method_of(results)]
    write_report(
        folder / "report.html",
        title=f"{results['data']['name']}: {results['nodes']} nodes, start {settings['start']}",
        question=question_of(results),
        answer=answer_of(results),
        sections=sections,
        provenance=results["provenance"],
    )
