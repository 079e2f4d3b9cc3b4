"""What ``fedrebasin merge`` says in the terminal."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table

from fedrebasin.simulations.merge_command import Merged
from fedrebasin.simulations.merge_memory import peak, size_text
from fedrebasin.simulations.merge_request import Request

_SHOWN = 40


def print_merged(merged: Merged, request: Request) -> None:
    """Objective, moved units, barriers where labels were given, memory, and where the file is."""
    console = Console(file=sys.stdout, highlight=False)
    found, files = merged.found, [path.name for path in request.files]
    table = Table("permutation", "units", *(f"moved in {name}" for name in files))
    names = list(merged.network.spec.perm_shapes)
    for name in names[:_SHOWN]:
        moved = [_moved(perms[name]) for perms in found.perms]
        table.add_row(name, f"{found.perms[0][name].numel():,}", *(f"{count:,}" for count in moved))
    if request.dry_run:
        console.print(table)
        if len(names) > _SHOWN:
            console.print(f"and {len(names) - _SHOWN} more permutations")
    rows = Table.grid(padding=(0, 2))
    total = sum(perm.numel() for perm in found.perms[0].values())
    for file, weight, perms in zip(files, merged.coefficients, found.perms, strict=True):
        count = sum(map(_moved, perms.values()))
        rows.add_row(file, f"coefficient {weight:.4g}; {count:,} of {total:,} units change place")
    rows.add_row("matching", f"{merged.plan.matching}, {merged.plan.method}")
    rows.add_row("objective", f"{found.objective_before:.6g} before, {found.objective:.6g} after")
    for name, value in found.measures.items():
        rows.add_row(name, f"{value:.6g}")
    for file, (plain, aligned) in merged.barriers.items():
        rows.add_row("loss barrier", f"to {file}: {plain:.4f} plain, {aligned:.4f} aligned")
    needs = merged.needs
    streamed = f"{size_text(needs.streamed)} tensor by tensor" if needs.streamed else f"{needs.why} needs them whole"
    way = "read tensor by tensor" if merged.streamed else "held"
    rows.add_row("memory", f"expected {size_text(needs.held)} with the models held, {streamed}")
    rows.add_row("", f"models were {way}" + (f"; the peak of this process was {size_text(peak())}" if peak() else ""))
    rows.add_row("output", "none (--dry-run)" if merged.output is None else str(merged.output))
    console.print(rows)


def _moved(perm: torch.Tensor) -> int:
    return int((perm != torch.arange(perm.shape[-1])).sum())
