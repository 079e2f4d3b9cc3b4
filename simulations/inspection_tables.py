"""What ``fedrebasin inspect`` says of a spec, as tables for the terminal and the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fedrebasin.layout import Fixed, leaves
from fedrebasin.simulations.inspection import Inspection
from fedrebasin.simulations.report import Table, duration
from fedrebasin.spec import PermutationSpec

#: axes of a permutation, and places of a reason, that a table names
_SHOWN = 4


def tied_axes(spec: PermutationSpec, perm: str) -> list[str]:
    """The axes that a permutation moves, as ``name:dim``."""
    return [f"{axis.name}:{axis.dim}" for axis in spec.tied[perm]]


def tied_layers(spec: PermutationSpec, perm: str) -> list[str]:
    """The same, with the tensors of one module that move along the same dimension as one entry, ``module.*:dim``.

    >>> from fedrebasin.layout import Free
    >>> one = (Free("a", 2),)
    >>> tied_layers(PermutationSpec({"fc.weight": (*one, Fixed(3)), "fc.bias": one, "b.weight": one}), "a")
    ['fc.*:0', 'b.weight:0']
    """
    found: dict[tuple[str, int], list[str]] = {}
    for axis in spec.tied[perm]:
        found.setdefault((axis.name.rpartition(".")[0], axis.dim), []).append(axis.name)
    return [
        f"{names[0] if len(names) == 1 else f'{owner}.*'.removeprefix('.')}:{dim}"
        for (owner, dim), names in found.items()
    ]


def size_of(spec: PermutationSpec, perm: str) -> str:
    """The size of a permutation; a family's is ``outer x n``.

    >>> from fedrebasin.layout import Free
    >>> size_of(PermutationSpec({"w": (Free("a", 8),)}), "a")
    '8'
    """
    return " x ".join(f"{size:,}" for size in spec.perm_shapes[perm])


def fixed_places(spec: PermutationSpec) -> dict[str, list[str]]:
    """For every reason the axes, as ``name:dim``, of which all units or some are fixed for it.

    >>> from fedrebasin.layout import Free
    >>> fixed_places(PermutationSpec({"w": (Fixed(3, "output"), Free("a", 8))}))
    {'output': ['w:0']}
    """
    found: dict[str, dict[str, None]] = {}
    for name, layouts in spec.axes.items():
        for dim, layout in enumerate(layouts):
            for leaf in leaves(layout):
                if isinstance(leaf, Fixed) and leaf.size > 1:
                    found.setdefault(leaf.reason or "by hand", {})[f"{name}:{dim}"] = None
    return {reason: list(places) for reason, places in found.items()}


def shorten(texts: Sequence[str], shown: int = _SHOWN) -> str:
    """The first few texts, and how many more there are.

    >>> shorten(["a", "b", "c"], 2), shorten(["a", "b"], 2)
    ('a, b and 1 more', 'a, b')
    """
    more = len(texts) - shown
    return ", ".join(texts[:shown]) + (f" and {more} more" if more > 0 else "")


def perms_table(spec: PermutationSpec) -> Table:
    """One row for each permutation."""
    rows = []
    for perm in spec.perm_shapes:
        over = f", one for each of {spec.over[perm]}" if perm in spec.over else ""
        rows.append([perm, size_of(spec, perm) + over, shorten(tied_layers(spec, perm))])
    return Table("Permutations and the axes (tensor:dimension) that each ties", ["perm", "size", "axes"], rows)


def fixed_table(spec: PermutationSpec) -> Table:
    """One row for each reason."""
    rows = [[reason, str(len(places)), shorten(places)] for reason, places in fixed_places(spec).items()]
    return Table("What stays fixed, and why", ["reason", "axes", "first places"], rows)


def facts(found: Inspection) -> list[tuple[str, str]]:
    """Name and value of every number of an inspection."""
    spec = found.spec
    orders = f"; 10^{spec.log10_order:,.1f} orders of the units keep the function" if spec.perm_shapes else ""
    weights = "; built on the meta device, no weights held" if found.device == "meta" else ""
    return [
        ("model", f"{found.name}, called with {found.inputs}{weights}"),
        ("parameters", f"{found.parameters:,}; {found.free_share:.2%} in tensors that some permutation moves"),
        (
            "permutations",
            f"{len(spec.perm_shapes):,}{orders}",
        ),
        ("time", f"export {duration(found.export_seconds)}, trace {found.trace_seconds:.2f} s"),
        ("proof", proof_of(found)),
    ]


def proof_of(found: Inspection) -> str:
    """What the check said.

    >>> proof_of(Inspection("", "", PermutationSpec({}), 0, 0.0, 0.0, 0.0, "cpu"))
    'skipped'
    """
    if found.change is None:
        return "skipped"
    return f"passed on random weights; the largest relative change of an output is {found.change:.1g}"


def notes_of(spec: PermutationSpec) -> list[str]:
    """The spec's notes, or one line that says that there are none."""
    return list(spec.notes) or ["every op that was met has a rule"]


def print_inspection(found: Inspection) -> None:
    """Print an inspection on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in (perms_table(found.spec), fixed_table(found.spec)):
        if table.rows:
            print_table(console, table)
    grid = RichTable.grid(padding=(0, 2))
    for name, text in [*facts(found), *(("note", note) for note in notes_of(found.spec))]:
        grid.add_row(Text(name, style="bold"), Text(text))
    console.print(grid)


def print_table(console: Console, table: Table, right: Sequence[str] = ()) -> None:
    """Print a table; the columns named in ``right`` hold numbers. Names fold, so that none is cut."""
    shown = RichTable(title=table.caption, title_justify="left")
    for column in table.columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
