"""A sweep's pictures and page, made from its results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrebasin.simulations.disjoint_numbers import DATASETS, ROWS, spread_text
from fedrebasin.simulations.plot_scales import wants_nines
from fedrebasin.simulations.plots import Panel, Series, save_lines
from fedrebasin.simulations.report import Picture, Section, Table, write_report
from fedrebasin.simulations.results import summarise
from fedrebasin.simulations.sweep_numbers import (
    barriers,
    losses_and_shares,
    merge_of,
    rows_of,
    table,
    title,
    value_text,
    wins,
)

Results = Mapping[str, Any]

AXES = {"width": "width", "epochs": "epochs of each training", "held": "share of a class that the other client has"}
#: row -> index of its style; corrections take 2 and 4
STYLES = {"plain": 1, "aligned": 0, "better-end": 3, "better-end+corrected": 5, "ensemble-logits": 6, "all": 7}


def render(results: Results, folder: Path) -> Path:
    """Draw the pictures and write ``report.html`` into ``folder``; returns the page.

    Raises
    ------
    UsageError
        If matplotlib or jinja2 is missing.
    """
    pictures = draw(results, folder)
    page = folder / "report.html"
    columns, rows = table(results)
    plain = [[cell.replace("**", "") for cell in row] for row in rows]
    ours = [place for place, row in enumerate(rows) if row[0].startswith("**")]
    sections: list[Section] = [_setting(results), Table(title(results), columns, plain, _note(results), ours)]
    write_report(
        page,
        title=f"Where merging pays, by {AXES[results['over']]}: {title(results)}",
        question=_question(results),
        answer=answer(results),
        sections=[*sections, *pictures],
        provenance=results["provenance"],
    )
    return page


def draw(results: Results, folder: Path) -> list[Picture]:
    """Draw merges and baselines, and the loss barriers, over the values, as PNG files."""
    name = DATASETS[results["config"]["dataset"]]
    panels = [
        _panel(results, f"{name}: test loss", "cross-entropy", loss=True),
        _panel(results, f"{name}: test accuracy", "top-1 accuracy", loss=False),
    ]
    save_lines(folder / "sweep.png", panels)
    save_lines(folder / "barrier.png", [_barrier_panel(results, name)])
    bands = " Bands: standard deviation over seeds." if _seeds(results) > 1 else ""
    return [
        Picture(
            f"Averages in the middle (lam = 0.5), and what they have to be compared with.{bands}", folder / "sweep.png"
        ),
        Picture(f"The largest loss between the ends less the mean of their own losses.{bands}", folder / "barrier.png"),
    ]


def answer(results: Results) -> str:
    """Where the merge beats both ends, whichever way it goes."""
    merge, values, over = merge_of(results), results["values"], results["over"]
    counted = {value: wins(results, value, merge) for value in values}
    said = []
    for place, measure in enumerate(("test loss", "accuracy")):
        always = [value_text(over, value) for value, one in counted.items() if one[place] == one[2]]
        said.append(f"on {measure} " + (f"at {', '.join(always)}" if always else "at none of the values"))
    text = f"In every seed the {ROWS[merge]} beats both ends {' and '.join(said)}."
    if results["same-data"]:
        parts = [
            f"{spread_text(barriers(results, value, 'plain', part))} plain and "
            f"{spread_text(barriers(results, value, 'aligned', part))} aligned on {images} images "
            f"({value_text(over, value)})"
            for value in values
            for part, images in (("test", "test"), ("train", "training"))
        ]
        return f"The loss barrier is {'; '.join(parts)}. {text}"
    return text


def _question(results: Results) -> str:
    share = "all the data" if results["same-data"] else "its own, skewed half of the data"
    return (
        f"Two networks start from different random weights and train on {share}. Their average is taken after the "
        f"hidden units of one have been put into the other's order. How does its worth depend on the "
        f"{AXES[results['over']]}?"
    )


def _setting(results: Results) -> str:
    config = results["config"]
    parts = [f"{title(results)}; {config['images']['train']:,} training and {config['images']['test']:,} test images"]
    if results["over"] != "held" and not results["same-data"]:
        parts.append(
            f"each client has {config['held']:.0%} of the images of one half of the classes and the rest of "
            "the other half's"
        )
    seeds = _seeds(results)
    parts.append(f"{seeds} seeds, mean ± standard deviation" if seeds > 1 else "one seed")
    return "; ".join(parts) + "."


def _note(results: Results) -> str:
    config = results["config"]
    images = min(config["calibration_images"], config["images"]["train"])
    return (
        f"Averages are taken in the middle (lam = 0.5). Corrections see {images:,} training images without labels. "
        f"Barriers: the largest loss of {config['lams']} points of the path less the mean of its ends' losses."
    )


def _seeds(results: Results) -> int:
    return len({point["seed"] for point in results["points"]})


def _panel(results: Results, name: str, ylabel: str, *, loss: bool) -> Panel:
    labels = rows_of(results)
    corrected = [row for row in labels if row.startswith("aligned+")][:2]
    styles = {**STYLES, **dict(zip(corrected, (2, 4), strict=False))}
    series = []
    for row in (row for row in labels if row in styles):
        found = [losses_and_shares(results, value, row)[0 if loss else 1] for value in results["values"]]
        series.append(_series(labels[row], found, styles[row]))
    return _over(results, name, ylabel, series, percent=not loss, log=loss)


def _barrier_panel(results: Results, name: str) -> Panel:
    series = []
    for place, part in enumerate(("test", "train")):
        for path in ("plain", "aligned"):
            found = [barriers(results, value, path, part) for value in results["values"]]
            style = STYLES[path] if place == 0 else {"plain": 3, "aligned": 4}[path]
            series.append(_series(f"{path}, {'test' if place == 0 else 'training'} images", found, style))
    return _over(results, f"{name}: loss barrier between the ends", "cross-entropy", series)


def _series(label: str, found: Sequence[Sequence[float]], style: int) -> Series:
    points = [summarise(one) for one in found]
    return Series(label, list(range(len(found))), [one[0] for one in points], [one[1] for one in points], style)


def _over(
    results: Results, name: str, ylabel: str, series: Sequence[Series], *, percent: bool = False, log: bool = False
) -> Panel:
    """Values stand at equal distances: widths double, and so do most of the others, nearly."""
    values = results["values"]
    nines = percent and wants_nines([value for one in series for value in one.y if value is not None])
    names = [f"{value:.3g}" if results["over"] == "held" else f"{value:g}" for value in values]
    return Panel(
        name,
        AXES[results["over"]],
        ylabel + (" (errors on a log axis)" if nines else ""),
        series,
        ticks=list(range(len(values))),
        names=names,
        percent=percent,
        log=log,
        nines=nines,
    )
