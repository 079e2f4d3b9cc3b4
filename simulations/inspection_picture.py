"""The picture of which layers are tied: one row a layer, one line a permutation, drawn as SVG.

Lines share a lane where their rows do not overlap, as in a graph of commits: a chain of hundreds of layers needs
a few lanes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby

from fedrebasin.simulations.inspection_tables import fixed_places, size_of
from fedrebasin.spec import PermutationSpec

ROW = 20
_LANE, _MARGIN, _DOT = 14, 12, 4.5
COLOURS = 7


@dataclass(frozen=True)
class Layer:
    """One row: a module that holds tensors, or a single tensor where the module holds other modules too."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One permutation: its lane and colour, and for every row whether it moves first axes, later ones or both."""

    perm: str
    lane: int
    colour: int
    dots: dict[int, str]

    @property
    def first(self) -> int:
        """The row that it starts in."""
        return min(self.dots)

    @property
    def last(self) -> int:
        """The row that it ends in."""
        return max(self.dots)


def layers(spec: PermutationSpec) -> list[Layer]:
    """The rows, in the order of the state dict.

    >>> from fedrebasin.layout import Fixed, Free
    >>> axes = {"table": (Fixed(3),), "fc.weight": (Free("fc", 2),), "fc.bias": (Free("fc", 2),)}
    >>> [layer.name for layer in layers(PermutationSpec(axes))]
    ['table', 'fc']
    """
    owners = {name: name.rpartition(".")[0] for name in spec.axes}
    holders = {owner[:end] for owner in owners.values() for end, letter in enumerate(owner) if letter == "."} | {""}
    keys = {name: name if owner in holders else owner for name, owner in owners.items()}
    return [Layer(key, tuple(names)) for key, names in groupby(spec.axes, keys.__getitem__)]


def lines(spec: PermutationSpec, rows: list[Layer]) -> list[Line]:
    """A lane and a colour for every permutation; lines that meet in a row never share a lane."""
    row_of = {name: number for number, layer in enumerate(rows) for name in layer.tensors}
    dots: dict[str, dict[int, str]] = {}
    for perm, axes in spec.tied.items():
        found: dict[int, set[bool]] = {}
        for axis in axes:
            found.setdefault(row_of[axis.name], set()).add(axis.dim == 0)
        dots[perm] = {
            row: "both" if len(kinds) == 2 else "first" if True in kinds else "later" for row, kinds in found.items()
        }
    placed: list[Line] = []
    ends: list[Line | None] = []
    for perm in sorted(dots, key=lambda perm: (min(dots[perm]), -max(dots[perm]))):
        first = min(dots[perm])
        lane = next((lane for lane, end in enumerate(ends) if end is None or end.last < first), len(ends))
        ends += [None] * (lane + 1 - len(ends))
        near = {end.colour for end in ends[max(0, lane - 2) : lane + 3] if end is not None}
        turn = [(len(placed) + step) % COLOURS for step in range(COLOURS)]
        colour = next((colour for colour in turn if colour not in near), turn[0])
        line = Line(perm, lane, colour, dots[perm])
        placed.append(line)
        ends[lane] = line
    return placed


def draw(spec: PermutationSpec) -> str:
    """The picture as HTML: the layers' names in a column that stays in sight, the lines as SVG beside it."""
    rows = layers(spec)
    drawn = lines(spec, rows)
    lanes = 1 + max((line.lane for line in drawn), default=0)
    text_x = 2 * _MARGIN + lanes * _LANE
    starts: dict[int, list[Line]] = {}
    for line in drawn:
        starts.setdefault(line.first, []).append(line)
    touched = {row for line in drawn for row in line.dots}
    reasons = _reasons(spec)
    labels = {row: _label(spec, rows[row], begun) for row, begun in starts.items()}
    for number, layer in enumerate(rows):
        if number not in touched:
            why = dict.fromkeys(reason for name in layer.tensors for reason in reasons.get(name, ()))
            labels[number] = (f"fixed: {', '.join(why)}" if why else "", "")
    width = text_x + 7 * max((len(plain) for plain, _ in labels.values()), default=0) + _MARGIN
    height = ROW * len(rows)
    alt = f"{len(drawn)} permutations over {len(rows)} layers; the table of permutations says the same in words"
    svg = [f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">']
    svg += [f'<path class="rule" d="M0 {_y(row)}H{text_x - _MARGIN}"/>' for row in range(len(rows))]
    svg += [_draw_line(spec, line) for line in drawn]
    for row, (plain, marked) in labels.items():
        svg.append(f'<text x="{text_x}" y="{_y(row) + 4}">{marked or escape(plain)}</text>')
    names = [_name(layer, number in touched) for number, layer in enumerate(rows)]
    return f'<ol class="layers">{"".join(names)}</ol>{"".join(svg)}</svg>'


def _reasons(spec: PermutationSpec) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for reason, places in fixed_places(spec).items():
        for place in places:
            found.setdefault(place.rpartition(":")[0], []).append(reason)
    return found


def _y(row: int) -> int:
    return ROW * row + ROW // 2


def _x(lane: int) -> int:
    return _MARGIN + lane * _LANE


def _draw_line(spec: PermutationSpec, line: Line) -> str:
    x = _x(line.lane)
    family = " family" if line.perm in spec.over else ""
    dots = "".join(_dot(x, _y(row), kind) for row, kind in sorted(line.dots.items()))
    title = f"{line.perm}: {size_of(spec, line.perm)}, {len(spec.tied[line.perm])} axes"
    way = f"M{x} {_y(line.first)}V{_y(line.last)}"
    stroke = f'<path class="wide" d="{way}"/><path d="{way}"/>'  # the wide one is not seen, and easy to point at
    return f'<g class="line c{line.colour}{family}"><title>{escape(title)}</title>{stroke}{dots}</g>'


def _dot(x: int, y: int, kind: str) -> str:
    ring = f'<circle class="{"ring" if kind != "first" else "full"}" cx="{x}" cy="{y}" r="{_DOT}"/>'
    return ring + (f'<circle class="full" cx="{x}" cy="{y}" r="2"/>' if kind == "both" else "")


def _label(spec: PermutationSpec, layer: Layer, begun: list[Line]) -> tuple[str, str]:
    """What stands beside a row in which lines start: the names, without what the row says already, and sizes."""
    plain, marked = [], []
    for line in begun:
        owner, mark, number = line.perm.partition("#")
        name = mark + number if f"{layer.name}.".startswith(f"{owner}.") else line.perm
        text = f"{name} {size_of(spec, line.perm)}".strip()
        plain.append(text)
        marked.append(f'<tspan class="c{line.colour}">{escape(text)}</tspan>')
    return ", ".join(plain), ", ".join(marked)


def _name(layer: Layer, touched: bool) -> str:
    owner, dot, own = layer.name.rpartition(".")
    soft = f"<i>{escape(owner + dot)}</i>" if owner else ""
    style = "" if touched else ' class="fixed"'
    return f'<li{style} title="{escape(layer.name)}"><bdi>{soft}{escape(own)}</bdi></li>'
