"""Line plots in one look: colour-blind safe, readable in black and white, legends that need no caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrebasin.errors import UsageError
from fedrebasin.simulations.plot_scales import log_scale, nines_scale
from fedrebasin.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: colour (Okabe and Ito, 2008; the yellow is left out: it drowns on white), line, marker
STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "D"),
    ("#CC79A7", ":", "X"),
    ("#56B4E9", (0, (5, 1)), "^"),
    ("#E69F00", (0, (3, 1, 1, 1, 1, 1)), "v"),
    ("#000000", "-.", "P"),
    ("#7F7F7F", ":", "p"),
)
HLINE_DASHES = ((0, (1, 1.5)), (0, (5, 2)), (0, (8, 2, 1.5, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)), (0, (12, 3)))
LOOK: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.9,
    "lines.markersize": 5.5,
    "savefig.facecolor": "white",
}
LABEL_GAP = 0.062  # smallest distance of two labels beside an axes, as a fraction of its height


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``; ``spread``, a standard deviation over seeds, is drawn as a band around it.

    ``style`` is an index into ``STYLES``; by default a label keeps its style in all panels of a figure.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] | None = None
    style: int | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes: lines, and horizontal lines that are labelled at the right-hand border.

    ``percent`` prints the fractions of the y axis as percentages; ``diagonal`` adds the line y = x to plot and legend;
    ``ticks`` are the places of the x axis' ticks, ``names`` what stands there instead of numbers; ``log`` takes the
    logarithm of the y axis, ``nines`` that of the distance from 1.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    ticks: Sequence[float] | None = None
    hlines: Sequence[tuple[str, float]] = ()
    percent: bool = False
    log: bool = False
    nines: bool = False
    diagonal: str = ""
    names: Sequence[str] = ()


def save_lines(path: Path, panels: Sequence[Panel]) -> None:
    """Draw ``panels`` beside each other, with one legend below, into a PNG file: whole or not at all.

    Raises
    ------
    UsageError
        If matplotlib is missing.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "loss.png"
    >>> save_lines(path, [Panel("Test loss", "lam", "loss", [Series("plain", [0, 0.5, 1], [0.1, 0.9, 0.2])])])
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f'plots need matplotlib ({error}); pip install "fedrebasin[simulation]"') from error
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    entries = [*labels, *dict.fromkeys(panel.diagonal for panel in panels if panel.diagonal)]
    with matplotlib.rc_context(LOOK):
        columns = _legend_columns(entries, len(panels))
        rows = -(-len(entries) // columns)
        figure = Figure(figsize=(6.0 * len(panels), 3.9 + 0.24 * rows), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axis, panel in zip(axes, panels, strict=True):
            for series in panel.series:
                number = labels.index(series.label) if series.style is None else series.style
                handles.setdefault(series.label, _draw(axis, series, STYLES[number % len(STYLES)]))
            if panel.diagonal:
                (handles[panel.diagonal],) = axis.plot([0, 1], [0, 1], color="#777777", linewidth=1, zorder=1)
            _dress(axis, panel)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, handlelength=3.4
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            figure.savefig(file, format="png")


def _legend_columns(labels: Sequence[str], panels: int) -> int:
    """As many columns as look well and fit; a letter takes about 5.6 points, the line and gaps of an entry 66."""
    columns = 2 if len(labels) <= 4 and panels == 1 else min(3, len(labels))
    while columns > 1:
        rows = -(-len(labels) // columns)  # a legend fills its first column first
        widths = [66 + 5.6 * max(map(len, labels[first : first + rows])) for first in range(0, len(labels), rows)]
        if sum(widths) <= 6.0 * panels * 72:
            break
        columns -= 1
    return columns


def _draw(axis: Axes, series: Series, style: tuple[str, Any, str]) -> Any:
    colour, line, marker = style
    x, y = np.asarray(series.x, dtype=float), np.array(series.y, dtype=float)
    every = max(1, len(x) // 8)
    (handle,) = axis.plot(
        x, y, color=colour, linestyle=line, marker=marker, markevery=every, markeredgecolor="white", markeredgewidth=0.6
    )
    if series.spread is not None and np.nanmax(np.nan_to_num(np.array(series.spread, dtype=float))) > 0:
        spread = np.array(series.spread, dtype=float)
        axis.fill_between(x, y - spread, y + spread, color=colour, alpha=0.17, linewidth=0)
    return handle


def _dress(axis: Axes, panel: Panel) -> None:
    axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.ticks is not None:
        axis.set_xticks(list(panel.ticks))
    if panel.names:
        slanted = max(map(len, panel.names)) > 6  # names of layers, which would lie over each other
        turn: dict[str, Any] = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": 8.5} if slanted else {}
        )
        axis.set_xticklabels(panel.names, **turn)
    if panel.percent:
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    hlines = [(label, value) for label, value in panel.hlines if np.isfinite(value)]
    for number, (_, value) in enumerate(hlines):
        axis.axhline(
            value, color="#3C3C3C", linewidth=1.1, linestyle=HLINE_DASHES[number % len(HLINE_DASHES)], zorder=1.5
        )
    if panel.log:
        log_scale(axis)
    if panel.nines:
        nines_scale(axis)
    # the limits must be final before labels are placed beside them
    axis.set_ylim(axis.get_ylim())
    axis.margins(x=0.02)
    to_axes = axis.transData + axis.transAxes.inverted()
    heights = [float(to_axes.transform((axis.get_xlim()[0], value))[1]) for _, value in hlines]
    for (label, _), height, place in zip(hlines, heights, _label_places(heights), strict=True):
        axis.annotate(
            label,
            xy=(1.0, height),
            xytext=(1.035, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color="#222222",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#9A9A9A", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
        )


def _label_places(heights: Sequence[float]) -> list[float]:
    """Apart from each other, and none so high that it meets the title."""
    from_top = np.argsort(np.argsort([-height for height in heights], kind="stable"), kind="stable")
    low = [min(height, 0.97 - rank * LABEL_GAP) for height, rank in zip(heights, from_top, strict=True)]
    return spread_apart(low, LABEL_GAP)


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Move places as little as is needed for neighbours to be ``gap`` apart, their order kept.

    Examples
    --------
    >>> [round(place, 2) for place in spread_apart([0.5, 0.5, 0.9], 0.1)]
    [0.45, 0.55, 0.9]
    """
    order = np.argsort(places, kind="stable")
    # least squares under y[i + 1] - y[i] >= gap is an isotonic regression of places - i * gap
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        blocks.append((places[index] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, n), (high, m) = blocks[-2:]
            blocks[-2:] = [((low * n + high * m) / (n + m), n + m)]
    flat = [value for value, count in blocks for _ in range(count)]
    moved = [0.0] * len(places)
    for rank, index in enumerate(order):
        moved[index] = float(flat[rank] + rank * gap)
    return moved
