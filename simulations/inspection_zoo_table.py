"""The rows of ``fedrebasin inspect --zoo`` as a table."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from fedrebasin.simulations.inspection_tables import print_table
from fedrebasin.simulations.inspection_zoo import unusual
from fedrebasin.simulations.inspection_zoo_row import Row
from fedrebasin.simulations.report import Table


def zoo_table(results: dict[str, Any]) -> Table:
    """One row for each model."""
    columns = ["model", "parameters", "perms", "log10 order", "free", "export", "trace", "change", "peak MiB", "fixed"]
    rows = [_cells(row) for row in results["rows"]]
    return Table("Permutation specs of torchvision's classifiers (seconds; fixed: other than usual)", columns, rows)


def print_zoo(results: dict[str, Any]) -> int:
    """Print the table and what did not work; returns the exit status, 1 if a model failed."""
    rows = results["rows"]
    table = zoo_table(results)
    print_table(Console(width=None if sys.stdout.isatty() else 150), table, right=table.columns[1:-1])
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"{row['model']}: {row['error']}")
    noted = [row for row in rows if row["notes"]]
    for row in noted:
        print(f"{row['model']}: {'; '.join(row['notes'])}")
    proved = sum(row["proof"] == "passed" for row in rows)
    print(f"{len(rows)} models, {len(rows) - len(failed)} traced, {proved} proved")
    return 1 if failed else 0


def _cells(row: Row) -> list[str]:
    def cell(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    return [
        row["model"],
        cell("parameters", ",d"),
        cell("perms", ",d"),
        cell("log10-order", ",.0f"),
        cell("free-share", ".2%"),
        cell("export-seconds", ".2f"),
        cell("trace-seconds", ".3f"),
        cell("change", ".0e"),
        cell("peak-mib", ",.0f"),
        "failed" if row["error"] else ", ".join(f"{why} {count}" for why, count in unusual(row["fixed"]).items()),
    ]
