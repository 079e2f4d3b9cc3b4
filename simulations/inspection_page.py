"""The page about one model's spec, written without a template engine: it loads nothing and holds no script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedrebasin.simulations.inspection import Inspection
from fedrebasin.simulations.inspection_picture import COLOURS, ROW, draw
from fedrebasin.simulations.inspection_tables import (
    facts,
    fixed_table,
    notes_of,
    perms_table,
    shorten,
    tied_axes,
    tied_layers,
)
from fedrebasin.simulations.report import TEMPLATE, provenance_rows
from fedrebasin.simulations.results import write_whole
from fedrebasin.spec import PermutationSpec

#: colours that stay apart for most eyes (Okabe and Ito 2008), for light and for dark paper
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8508c", "#b07a00", "#2f8fd0", "#5b4fa8")
_DARK = ("#6bb8e8", "#ff9c57", "#3fcf9f", "#e59ac4", "#e6b03a", "#8fd3ff", "#b0a5f0")
#: axes of a permutation that its row shows before it is opened
_SHOWN = 3

_STYLE = f"""
h1 {{ overflow-wrap: anywhere; }}
.tied {{ display: flex; width: fit-content; max-width: 100%; align-items: flex-start;
  border: 1px solid var(--line); border-radius: 8px; padding: 8px 0; }}
.layers {{ flex: none; list-style: none; margin: 0; padding: 0 10px; max-width: min(46vw, 30rem);
  position: sticky; left: 0; z-index: 1; background: var(--paper); border-right: 1px solid var(--line); }}
.layers li {{ height: {ROW}px; line-height: {ROW}px; font-size: 12.5px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; direction: rtl; text-align: left; }}
.layers i {{ font-style: normal; color: var(--soft); }}
.layers .fixed {{ color: var(--soft); }}
.tied svg {{ flex: none; display: block; font-size: 12px; }}
.tied text {{ fill: var(--soft); }}
.rule {{ stroke: var(--line); stroke-width: 1; }}
.line path {{ stroke: currentColor; stroke-width: 2.5; fill: none; }}
.line .wide {{ stroke: transparent; stroke-width: 12; }}
.family path:not(.wide) {{ stroke-dasharray: 5 3; }}
.full {{ fill: currentColor; }}
.ring {{ fill: var(--paper); stroke: currentColor; stroke-width: 2; }}
svg:has(.line:hover) .line:not(:hover) {{ opacity: .18; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 0 0 10px; list-style: none;
  color: var(--soft); font-size: .92rem; }}
.legend svg {{ vertical-align: -3px; margin-right: 6px; color: var(--accent); }}
details summary {{ cursor: pointer; }}
details ul {{ list-style: none; margin: 4px 0 0; padding: 0; }}
.words th, .words td {{ text-align: left; vertical-align: top; white-space: normal; overflow-wrap: break-word; }}
.words th:last-child, .words td:last-child {{ width: 100%; min-width: 8.5rem; }}
.words tbody th {{ min-width: 5.5rem; }}
@media (min-width: 800px) {{
  .words tbody th {{ min-width: 9rem; }}
  .perms tbody th {{ min-width: 18rem; }}
  .perms td:nth-child(2) {{ min-width: 14rem; }}
}}
nav a {{ color: var(--accent); margin-right: 16px; }}
"""


def write_page(path: Path, found: Inspection, provenance: Mapping[str, Any]) -> None:
    """Write the page about ``found``, whole or not at all.

    Parameters
    ----------
    provenance : mapping
        What ``results.provenance`` returned; shown at the foot.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "page.html"
    >>> write_page(path, Inspection("net", "2x4", PermutationSpec({}), 0, 0.0, 0.0, 0.0, "cpu"), {"command": "x"})
    >>> "<title>Permutations of net</title>" in path.read_text(encoding="utf-8")
    True
    """
    write_whole(path, _page(found, provenance))


def _page(found: Inspection, provenance: Mapping[str, Any]) -> str:
    spec, name = found.spec, escape(found.name)
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in facts(found))
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in notes_of(spec))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Permutations of {name}</title>
<style>{_shared_style()}{_STYLE}{_colours()}</style>
</head>
<body>
<main>
<header>
<h1>Which units of {name} may change places</h1>
<p class="question">A permutation moves the units of one layer and, with them, every axis of every tensor that is tied
to them; the function of the network stays the same.</p>
<div class="answer"><dl>{rows}</dl></div>
<nav><a href="#tied">Tied layers</a><a href="#fixed">Fixed</a><a href="#perms">Permutations</a></nav>
</header>
<h2 id="tied">Which layers are tied</h2>
<p>One row for each layer, in the model's order; one line for each permutation, with its number of units beside the row
where it starts. Point at a line for its name. Lines that do not meet share a lane.</p>
{_legend()}
<div class="scroll tied" tabindex="0">{draw(spec)}</div>
<h2 id="fixed">What stays fixed, and why</h2>
{_fixed(spec)}
{notes}
<h2 id="perms">Permutations</h2>
{_perms(spec)}
</main>
<footer><dl>{_foot(provenance)}</dl></footer>
</body>
</html>
"""


def _shared_style() -> str:
    """The look of all pages; the template is read as text."""
    text = TEMPLATE.read_text(encoding="utf-8")
    return text[text.index("<style>") + len("<style>") : text.index("</style>")]


def _colours() -> str:
    light = "".join(f".c{number} {{ color: {_LIGHT[number]}; fill: {_LIGHT[number]}; }}\n" for number in range(COLOURS))
    dark = "".join(f".c{number} {{ color: {_DARK[number]}; fill: {_DARK[number]}; }}\n" for number in range(COLOURS))
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _legend() -> str:
    marks = {
        "the first axis of a tensor: as a rule the layer's outputs": '<circle class="full" cx="7" cy="7" r="4.5"/>',
        "a later axis: as a rule its inputs": '<circle class="ring" cx="7" cy="7" r="4.5"/>',
        "both": '<circle class="ring" cx="7" cy="7" r="4.5"/><circle class="full" cx="7" cy="7" r="2"/>',
        "dashed: a family, one permutation for each group or head": '<g class="line family"><path d="M7 -8V22"/></g>',
    }
    items = (
        f'<li><svg width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>{text}</li>'
        for text, mark in marks.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _fixed(spec: PermutationSpec) -> str:
    table = fixed_table(spec)
    rows = [[_words(cell) for cell in row] for row in table.rows]
    return _table("words", table.columns, rows) if rows else "<p>Nothing.</p>"


def _perms(spec: PermutationSpec) -> str:
    rows = [
        [_words(row[0]), _words(row[1]), _axes(spec, perm)]
        for perm, row in zip(spec.perm_shapes, perms_table(spec).rows, strict=True)
    ]
    columns = ["perm", "size", "the axes that it ties, as tensor:dimension"]
    return _table("words perms", columns, rows) if rows else "<p>None.</p>"


def _table(style: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    table = f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _axes(spec: PermutationSpec, perm: str) -> str:
    """A few layers, and all axes when it is opened."""
    short, axes = _words(shorten(tied_layers(spec, perm))), tied_axes(spec, perm)
    if len(axes) <= _SHOWN:
        return _words(", ".join(axes))
    items = "".join(f"<li>{_words(axis)}</li>" for axis in axes)
    return f"<details><summary>{short}</summary><ul>{items}</ul></details>"


def _words(text: str) -> str:
    """Text in which a dotted name may break after a dot or an underscore."""
    return re.sub(r"([._])(?=\w)", r"\1<wbr>", escape(text))


def _foot(provenance: Mapping[str, Any]) -> str:
    rows = ((key, text, ' class="command"' if key == "command" else "") for key, text in provenance_rows(provenance))
    return "".join(f"<dt>{escape(key)}</dt><dd{style}>{escape(text)}</dd>" for key, text, style in rows)
