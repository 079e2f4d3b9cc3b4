"""What the experiment shows: plots and page, drawn from the results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedrebasin.simulations.plots import Panel, Series, save_lines
from fedrebasin.simulations.report import Picture, Section, Table, duration, write_report
from fedrebasin.simulations.results import summarise

Results = Mapping[str, Any]

#: row of the results -> what the reader calls it, in the order of the table
ROWS = {
    "plain": "plain average",
    "plain+temperature": "plain average + temperature (labels)",
    "plain+reset": "plain average + BatchNorm reset",
    "plain+repair": "plain average + REPAIR",
    "aligned": "aligned average",
    "aligned+temperature": "aligned average + temperature (labels)",
    "aligned+reset": "aligned average + BatchNorm reset",
    "aligned+repair": "aligned average + REPAIR",
    "a": "A alone",
    "b": "B alone",
    "a+corrected": "A, label prior corrected",
    "b+corrected": "B, label prior corrected",
    "ensemble-logits": "ensemble of logits (twice the cost)",
    "ensemble-probabilities": "ensemble of probabilities (twice the cost)",
    "all": "one model trained on all data",
}
#: curve -> name in the legend and index of its style; the order fills the legend column by column
CURVES = {
    "plain": ("plain", 1),
    "plain+reset": ("plain + reset", 5),
    "plain+repair": ("plain + REPAIR", 3),
    "aligned": ("aligned", 0),
    "aligned+reset": ("aligned + reset", 4),
    "aligned+repair": ("aligned + REPAIR", 2),
}
DATASETS = {"digits": "Digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
TICKS = (0, 0.25, 0.5, 0.75, 1)
FEWEST_IMAGES = 0.01  # of all: a reliability bin with fewer is noise and is not drawn


def render(results: Results, folder: Path) -> Path:
    """Draw the plots and write ``report.html`` into ``folder``; returns the page.

    Raises
    ------
    UsageError
        If matplotlib or jinja2 is missing.
    """
    pictures = draw(results, folder)
    page = folder / "report.html"
    name = DATASETS[results["config"]["dataset"]]
    write_report(
        page,
        title=f"Two networks that trained apart, merged: {name}",
        question=_question(results),
        answer=answer(results),
        sections=_sections(results, pictures),
        provenance=results["provenance"],
    )
    return page


def draw(results: Results, folder: Path) -> list[Picture]:
    """Draw loss and accuracy along lam (the paper's Figures 5 and 10) and calibration (Figure 11) as PNG files."""
    name = DATASETS[results["config"]["dataset"]]
    jobs = [
        ("test-loss.png", _along(results, "test", "loss", f"{name}: test loss between A and B", "cross-entropy")),
        ("test-top1.png", _along(results, "test", "top1", f"{name}: test accuracy between A and B", "top-1 accuracy")),
        ("train-loss.png", _along(results, "train", "loss", f"{name}: training loss between A and B", "cross-entropy")),
        ("reliability.png", _reliability(results, f"{name}: are confident answers right?")),
    ]
    bands = " Bands: standard deviation over seeds." if len(results["seeds"]) > 1 else ""
    captions = (
        f"Test loss along the straight line from A to B (the paper's Figure 5).{bands}",
        "Top-1 accuracy along the same line (Figure 10).",
        "The same on training images of both halves.",
        "Share of right answers against confidence, on test images, averages at lam = 0.5 (Figure 11): above the "
        "diagonal a model is less sure than it could be. Bins with fewer than 1% of the images are left out.",
    )
    pictures = []
    for (file, panel), caption in zip(jobs, captions, strict=True):
        save_lines(folder / file, [panel])
        pictures.append(Picture(caption, folder / file))
    return pictures


def headline(results: Results) -> str:
    """The merge that the answer speaks of, fixed beforehand: with BatchNorm its reset, without norm no correction."""
    return "aligned+reset" if "aligned+reset" in results["seeds"][0]["rows"] else "aligned"


def per_seed(results: Results, row: str, part: str, key: str) -> list[float]:
    """One number of every seed; ``better-end`` and ``better-end+corrected`` are the better of A and B in it."""
    lower_is_better = key in ("loss", "ece")
    choose: Callable[[Sequence[float]], float] = min if lower_is_better else max
    names = {"better-end": ("a", "b"), "better-end+corrected": ("a+corrected", "b+corrected")}.get(row, (row,))
    return [choose([_number(seed["rows"][name][part][key]) for name in names]) for seed in results["seeds"]]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean(results: Results, row: str, key: str) -> float:
    return summarise(per_seed(results, row, "test", key))[0]


def spread_text(values: Sequence[float], *, percent: bool = False) -> str:
    """Mean and, for several seeds, standard deviation.

    >>> spread_text([0.5, 0.7], percent=True), spread_text([0.0912]), spread_text([12.3, 12.5])
    ('60.0 ± 14.1%', '0.091', '12.40 ± 0.14')
    """
    mean, deviation, n = summarise(values)
    if n == 0:
        return "not finite"
    scale, digits = (100, 1) if percent else (1, 3 if abs(mean) < 10 else 2)
    text = f"{scale * mean:.{digits}f}"
    if n > 1:
        text += f" ± {scale * deviation:.{digits}f}"
    return text + "%" if percent else text


def _question(results: Results) -> str:
    config = results["config"]
    share = f"{config['held']:.0%}"
    return (
        f"Networks A and B start from different random weights and never see each other's images: A has {share} of the "
        f"images of the lower half of the classes and the rest of the upper half, B the other way round. "
        "Is their average, taken after the hidden units of B have been put into A's order, better than each of them?"
    )


def verdict(gains: Sequence[float]) -> str:
    """Compare by what a merge gains in each seed: level if the mean gain is within one standard deviation of 0.

    >>> verdict([0.02, 0.03]), verdict([0.03, -0.02]), verdict([-0.01])
    ('better', 'level', 'worse')
    """
    mean, deviation, _ = summarise(gains)
    if abs(mean) <= deviation or mean == 0:
        return "level"
    return "better" if mean > 0 else "worse"


def answer(results: Results) -> str:
    """The question's answer in a few sentences, with the numbers."""
    merge = headline(results)
    seeds = len(results["seeds"])
    gains = {}
    for key, sign in (("loss", -1), ("top1", 1)):
        pairs = zip(per_seed(results, merge, "test", key), per_seed(results, "better-end", "test", key), strict=True)
        gains[key] = [sign * (ours - best) for ours, best in pairs]
    loss, top1 = verdict(gains["loss"]), verdict(gains["top1"])
    wins = {key: sum(gain > 0 for gain in gained) for key, gained in gains.items()}
    opening = {
        ("better", "better"): "Yes, on loss and on accuracy",
        ("worse", "worse"): "No, neither on loss nor on accuracy",
        ("level", "level"): "It is level with the better of them, on loss and on accuracy",
    }.get((loss, top1), f"Against the better of them it is {loss} on loss and {top1} on accuracy")

    counted = ""
    if seeds > 1:
        counted = (
            f" The merge beats both ends on loss in {wins['loss']} of {seeds} seeds, "
            f"on accuracy in {wins['top1']} of {seeds}."
        )

    def numbers(row: str) -> str:
        losses, shares = per_seed(results, row, "test", "loss"), per_seed(results, row, "test", "top1")
        return f"{spread_text(losses)} and {spread_text(shares, percent=True)}"

    return (
        f"{opening}. Test loss and top-1 accuracy: {ROWS[merge]} {numbers(merge)}; the better of A and B "
        f"{numbers('better-end')}; plain average {numbers('plain')}; the ensemble, which runs both networks, "
        f"{numbers('ensemble-logits')}.{counted}"
    )


def _sections(results: Results, pictures: list[Picture]) -> list[Section]:
    config = results["config"]
    recipe, images = config["recipe"], config["images"]
    setting = (
        f"{DATASETS[config['dataset']]}, {images['train']:,} training and {images['test']:,} test images; "
        f"{config['model']} of width {config['width']}{_norm(config)}; {config['epochs']} epochs of "
        f"{recipe['optimizer'].upper() if recipe['optimizer'] == 'sgd' else recipe['optimizer'].capitalize()} "
        f"at {recipe['lr']:g} ({recipe['schedule']}, batch {recipe['batch']}); {_seeds(results)}."
    )
    return [
        setting,
        _table(results),
        *pictures,
        "## Along the path",
        _path_table(results),
        "## Matching",
        _matching(results),
    ]


def _norm(config: Results) -> str:
    return "" if config["model"] == "mlp" else {"batch": " with BatchNorm", "layer": " with LayerNorm"}[config["norm"]]


def _seeds(results: Results) -> str:
    seeds = len(results["seeds"])
    return f"{seeds} seeds, mean ± standard deviation" if seeds > 1 else "one seed"


def _table(results: Results) -> Table:
    rows: list[list[str]] = []
    highlight: list[int] = []
    columns = ["model", "test loss", "top-1", "top-5", "calibration error", "training loss", "training top-1"]
    for name, label in ROWS.items():
        if name not in results["seeds"][0]["rows"]:
            continue
        if name == headline(results):
            highlight.append(len(rows))
        cells = [
            spread_text(per_seed(results, name, part, key), percent=key != "loss")
            for part, key in (
                ("test", "loss"),
                ("test", "top1"),
                ("test", "top5"),
                ("test", "ece"),
                ("train", "loss"),
                ("train", "top1"),
            )
        ]
        rows.append([label, *cells])
    config = results["config"]
    calibration = min(config["calibration_images"], config["images"]["train"])
    corrections = "BatchNorm reset and REPAIR see" if "plain+reset" in results["seeds"][0]["rows"] else "REPAIR sees"
    note = (
        f"Averages are taken in the middle (lam = 0.5). {corrections} {calibration:,} training images without labels; "
        f"the temperature is fitted on the labels of the same images. Training numbers are measured on "
        f"{min(5000, config['images']['train']):,} fixed images of both halves. A prior-corrected model has the "
        f"logarithm of its training labels' shares taken off its logits. Calibration error: expected, 15 bins."
    )
    return Table("Every model, on test and training images", columns, rows, note, highlight)


def _path_table(results: Results) -> Table:
    rows = []
    for name, (label, _) in CURVES.items():
        if name not in results["seeds"][0]["curves"]:
            continue
        row = [label]
        for part in ("test", "train"):
            for key in ("loss-barrier", "barrier-above-chord"):
                row.append(spread_text([_number(seed["curves"][name][part][key]) for seed in results["seeds"]]))
        best = [seed["curves"][name]["test"] for seed in results["seeds"]]
        row.append(", ".join(f"{_number(one['best-lam']):.2f}" for one in best))
        row.append(spread_text([min(_number(loss) for loss in one["loss"]) for one in best]))
        rows.append(row)
    config = results["config"]
    note = (
        f"Barrier: the largest loss of the path less the mean of its ends' losses (Git Re-Basin, Definition 2.2); "
        f"above the chord: less the straight line between them. {config['lams']} values of lam, with corrections "
        f"{config['corrected_lams']}, each corrected on "
        f"{min(config['curve_calibration_images'], config['images']['train']):,} images. The best lam is chosen on "
        f"the test set: it is a reading of the curve, not a method."
    )
    columns = [
        "path",
        "barrier, test",
        "above chord",
        "barrier, training",
        "above chord",
        "best lam",
        "test loss there",
    ]
    return Table("Barriers", columns, rows, note)


def _matching(results: Results) -> str:
    seeds = results["seeds"]
    moved = spread_text([seed["matching"]["moved-fraction"] for seed in seeds], percent=True)
    seconds = duration(float(np.mean([seed["seconds"]["matching"] for seed in seeds])))
    before = spread_text([seed["matching"]["objective-before"] for seed in seeds])
    after = spread_text([seed["matching"]["objective"] for seed in seeds])
    order = seeds[0]["matching"]["log10-order"]
    training = duration(results["provenance"]["training-seconds"])
    return (
        f"The network has 10^{order:,.0f} relabellings of hidden units that keep its function. Weight matching took "
        f"{seconds} a seed, moved {moved} of the units, and raised the inner product of the two networks' weights "
        f"from {before} to {after}. Training of all networks took {training} in all; what an earlier run had "
        f"trained or measured is used again and is not in the duration below."
    )


def _along(results: Results, part: str, key: str, title: str, ylabel: str) -> Panel:
    series = []
    for name, (label, style) in CURVES.items():
        curves = [seed["curves"][name] for seed in results["seeds"] if name in seed["curves"]]
        if not curves:
            continue
        points = [summarise([curve[part][key][i] for curve in curves]) for i in range(len(curves[0]["lams"]))]
        series.append(
            Series(label, curves[0]["lams"], [point[0] for point in points], [point[1] for point in points], style)
        )
    lines = [("better end", "better-end"), ("better end, prior corrected", "better-end+corrected")]
    lines.append(("ensemble of logits", "ensemble-logits"))
    if part == "test":  # on its own training images that model is near zero, far below everything else
        lines.append(("trained on all data", "all"))
    hlines = [(label, summarise(per_seed(results, row, part, key))[0]) for label, row in lines]
    return Panel(
        title=title,
        xlabel="lam (0: A, 1: B)",
        ylabel=ylabel,
        series=series,
        ticks=TICKS,
        hlines=hlines,
        percent=key != "loss",
        log=key == "loss",
    )


def _reliability(results: Results, title: str) -> Panel:
    merge = headline(results)
    shown = {
        "plain average": (("plain",), 1),
        ROWS[merge]: ((merge,), 0),
        "A and B alone": (("a", "b"), 3),
        "ensemble of logits": (("ensemble-logits",), 2),
        "trained on all data": (("all",), 6),
    }
    series = []
    for label, (names, style) in shown.items():
        pooled = [seed["reliability"][name] for seed in results["seeds"] for name in names]
        bins = {key: np.sum([one[key] for one in pooled], axis=0) for key in ("count", "confidence", "accuracy")}
        kept = bins["count"] >= max(1, FEWEST_IMAGES * bins["count"].sum())
        confidence, accuracy = (bins[key][kept] / bins["count"][kept] for key in ("confidence", "accuracy"))
        series.append(Series(label, confidence.tolist(), accuracy.tolist(), style=style))
    return Panel(
        title=title,
        xlabel="confidence (mean of the bin, seeds pooled)",
        ylabel="right answers",
        series=series,
        ticks=(0, 0.2, 0.4, 0.6, 0.8, 1),
        percent=True,
        diagonal="as often right as sure",
    )
