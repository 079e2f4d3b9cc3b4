"""The experiment's page: question, answer, tables and plots, made from the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedrebasin.simulations.disjoint_numbers import (
    CURVES,
    DATASETS,
    ROWS,
    Results,
    headline,
    in_precision,
    number,
    per_seed,
    spread_text,
)
from fedrebasin.simulations.disjoint_plots import draw
from fedrebasin.simulations.report import Picture, Section, Table, duration, write_report
from fedrebasin.simulations.results import summarise


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
        f"at {recipe['lr']:g} ({recipe['schedule']}, batch {recipe['batch']}){in_precision(config)}; {_seeds(results)}."
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
    note = (
        "Averages are taken in the middle (lam = 0.5). "
        f"Corrections see {calibration:,} training images without labels; "
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
                row.append(spread_text([number(seed["curves"][name][part][key]) for seed in results["seeds"]]))
        best = [seed["curves"][name]["test"] for seed in results["seeds"]]
        row.append(", ".join(f"{number(one['best-lam']):.2f}" for one in best))
        row.append(spread_text([min(number(loss) for loss in one["loss"]) for one in best]))
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
    method = results["config"].get("matching", "weight").capitalize()
    return (
        f"The network has 10^{order:,.0f} relabellings of hidden units that keep its function. {method} matching took "
        f"{seconds} a seed, moved {moved} of the units, and changed the inner product of the two networks' weights "
        f"from {before} to {after}. Training of all networks took {training} in all{_pace(seeds)}; what an earlier run "
        f"had trained or measured is used again and is not in the duration below."
    )


def _pace(seeds: Sequence[Results]) -> str:
    """Files of earlier versions do not know it."""
    paces = [pace for seed in seeds for pace in seed.get("images-per-second", {}).values()]
    return f", at {np.mean(paces):,.0f} images a second" if paces else ""
