"""Plots and the page of a comparison, from its results alone."""

from __future__ import annotations

from pathlib import Path

from fedrebasin.simulations.competitors import label_of
from fedrebasin.simulations.disjoint_numbers import DATASETS
from fedrebasin.simulations.report import Picture, Section, write_report
from fedrebasin.simulations.results import summarise
from fedrebasin.simulations.round_plots import save_rounds
from fedrebasin.simulations.summary import Results, baseline_rows, by_round, strategies
from fedrebasin.simulations.summary_tables import (
    alignment_table,
    baseline_table,
    bytes_table,
    node_table,
    presence_table,
    round_table,
)
from fedrebasin.simulations.summary_words import answer_of, method_of, question_of


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
