"""A comparison on the terminal: its progress while it runs, its numbers when it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedrebasin.simulations.competitors import label_of
from fedrebasin.simulations.events import Event
from fedrebasin.simulations.summary import (
    baseline_rows,
    percent,
    plain,
)
from fedrebasin.simulations.summary_tables import round_table

#: seconds between two lines about one node where the output is no terminal
QUIET = 5.0
#: bars for single nodes, at most
MOST_BARS = 8


class Lines:
    """Progress as plain lines, for logs and pipes."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.last: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        text = _describe(event)
        if event["event"] == "epoch" and event["epoch"] < event["epochs"]:
            now = time.monotonic()
            if now - self.last.get(event["node"], -QUIET) < QUIET:
                return
            self.last[event["node"]] = now
        if text:
            print(f"{time.monotonic() - self.started:6.1f} s  {text}", file=sys.stderr, flush=True)


class Bars:
    """Progress as bars: one for the rounds of all strategies, one for each node."""

    def __init__(self, progress: Progress, rounds: int) -> None:
        self.progress = progress
        self.rounds = progress.add_task("starting", total=rounds)
        self.nodes: dict[int, TaskID] = {}

    def __call__(self, event: Event) -> None:
        kind, text = event["event"], _describe(event)
        if kind == "epoch":
            node = event["node"]
            if node not in self.nodes and len(self.nodes) < MOST_BARS:
                self.nodes[node] = self.progress.add_task(f"  node {node}", total=event["epochs"])
            if node in self.nodes:
                self.progress.update(
                    self.nodes[node], completed=event["epoch"], total=event["epochs"], description=f"  {text}"
                )
        elif kind == "round" and event["round"] > 0:
            self.progress.console.print(text, highlight=False)
            self.progress.advance(self.rounds)
        elif text:
            self.progress.update(self.rounds, description=text)
        if kind == "round" and event["round"] < event["rounds"]:
            self.progress.update(self.rounds, description=f"{label_of(event['strategy'])}, round {event['round'] + 1}")


def _describe(event: Event) -> str:
    kind = event["event"]
    if kind == "phase":
        return str(event["text"])
    if kind == "epoch":
        where = f"{label_of(event['strategy'])}, round {event['round']}, node {event['node']}"
        return f"{where}: epoch {event['epoch']}/{event['epochs']}, training loss {event['loss']:.3f}"
    if kind == "round" and event["round"] > 0:
        where = f"{label_of(event['strategy'])}, seed {event['seed']}, round {event['round']}/{event['rounds']}"
        scores = f"test accuracy {percent([event['accuracy']])}%, loss {event['loss']:.3f}"
        return f"{where}: {scores} ({event['replies']} of {event['expected']} replies, {event['seconds']:.1f} s)"
    if kind == "waiting":
        return "waiting for the model of all data"
    if kind == "done":
        return "ending Flower's simulation runtime"
    return ""


@contextmanager
def progress_display(rounds: int) -> Iterator[Lines | Bars]:
    """Bars on a terminal, plain lines otherwise, both on stderr; ``rounds`` is the number over all strategies."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress, rounds)


def print_summary(results: dict[str, Any], folder: Path) -> None:
    """Print accuracies by round, the baselines and where the page lies."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    accuracies = round_table(results, "accuracy", "Test accuracy, %", as_percent=True)
    table = Table(title=accuracies.caption, title_justify="left")
    for number, column in enumerate(accuracies.columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for number, row in enumerate(accuracies.rows):
        table.add_row(*row, style="bold" if number in accuracies.highlight else "")
    console.print(table)
    if results["baselines"]:
        table = Table(title="Baselines", title_justify="left")
        table.add_column("Model")
        table.add_column("Accuracy, %", justify="right")
        table.add_column("Loss", justify="right")
        for name, values, losses in baseline_rows(results):
            table.add_row(name, percent(values), plain(losses))
        console.print(table)
    # a path must stay one line, so that it can be copied
    print(f"{results['provenance']['seconds']:.0f} s; the page is {folder / 'report.html'}")
