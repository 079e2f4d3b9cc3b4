"""One self-contained HTML page: question, answer, tables, pictures, and how the numbers came about."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fedrebasin.errors import UsageError
from fedrebasin.simulations.results import write_whole

TEMPLATE = Path(__file__).with_name("report.html.jinja")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Table:
    """A table of texts; ``highlight`` holds the numbers of the rows, from 0, that the eye should find first."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    highlight: Sequence[int] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A PNG file that goes into the page; pictures that follow each other stand side by side where there is room."""

    caption: str
    path: Path


Section = Table | Picture | str


def drawn(render: Callable[[], Path], results: Path, progress: Callable[[str], None]) -> Path:
    """The page that ``render`` makes; where matplotlib or jinja2 is missing, ``results``, with a line to ``progress``.

    Examples
    --------
    >>> drawn(lambda: Path("report.html"), Path("results.json"), print).name
    'report.html'
    """
    try:
        return render()
    except UsageError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        progress(f"{error}; {results} is complete, and plots and page can be drawn from it later")
        return results


def write_report(
    path: Path,
    *,
    title: str,
    question: str,
    answer: str,
    sections: Sequence[Section],
    provenance: Mapping[str, Any],
) -> None:
    """Write the page, whole or not at all. It loads nothing: images are in it, and it holds no script.

    Parameters
    ----------
    sections : sequence of Table, Picture or str
        A string is a paragraph of plain text, or a heading if it begins with ``"## "``.
    provenance : mapping
        What ``results.provenance`` returned; shown at the foot.

    Raises
    ------
    UsageError
        If jinja2 is missing, a picture is no PNG file, or a table's row has another number of cells than its columns.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "report.html"
    >>> table = Table("Test set", ["model", "loss"], [["aligned", "0.06"]])
    >>> write_report(path, title="t", question="Which?", answer="This.", sections=[table], provenance={"seeds": [0]})
    >>> "<td>0.06</td>" in path.read_text(encoding="utf-8")
    True
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise UsageError(f'the page needs jinja2 ({error}); pip install "fedrebasin[simulation]"') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        question=question,
        answer=answer,
        blocks=[block for kind, group in groupby(sections, type) for block in _blocks(kind, list(group))],
        facts=provenance_rows(provenance),
    )
    write_whole(path, page)


def _blocks(kind: type, sections: list[Any]) -> list[dict[str, Any]]:
    if kind is Picture:
        return [{"kind": "pictures", "pictures": [_embed(picture) for picture in sections]}]
    if kind is Table:
        return [{"kind": "table", "table": _checked(table)} for table in sections]
    headings = [section.startswith("## ") for section in sections]
    return [
        {"kind": "heading" if heading else "text", "text": section.removeprefix("## ")}
        for section, heading in zip(sections, headings, strict=True)
    ]


def _checked(table: Table) -> Table:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise UsageError(f"table {table.caption!r}: expected {len(table.columns)} cells in a row; got {list(row)}")
    return table


def _embed(picture: Picture) -> dict[str, Any]:
    try:
        data = picture.path.read_bytes()
    except OSError as error:
        raise UsageError(f"picture: cannot read {picture.path} ({error.strerror})") from error
    if not data.startswith(_PNG):
        raise UsageError(f"picture: expected a PNG file; {picture.path} is none")
    width, height = struct.unpack(">II", data[16:24])
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return {"caption": picture.caption, "source": source, "width": width, "height": height}


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and texts for the foot of a page, the command first.

    >>> provenance_rows({"command": "fedrebasin compare", "dirty": False, "seconds": 75.0})
    [('command', 'fedrebasin compare'), ('duration', '1 min 15 s')]
    """
    facts: list[tuple[str, str]] = []
    for key, value in provenance.items():
        if key == "dirty":
            continue
        if key == "commit" and provenance.get("dirty"):
            value = f"{value}, with changes that are not committed"
        elif key == "seconds" and isinstance(value, int | float):
            value = duration(float(value))
        elif isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            value = ", ".join(str(item) for item in value)
        facts.append(("duration" if key == "seconds" else key, str(value)))
    return facts


def duration(seconds: float) -> str:
    """Seconds as a text for people.

    >>> duration(4.25), duration(312), duration(7_290)
    ('4.2 s', '5 min 12 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
