"""The experiment's plots: loss and accuracy along lam, and calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedrebasin.simulations.disjoint_numbers import CURVES, DATASETS, ROWS, Results, headline, per_seed
from fedrebasin.simulations.plots import Panel, Series, save_lines
from fedrebasin.simulations.report import Picture
from fedrebasin.simulations.results import summarise
from fedrebasin.simulations.similarity_plot import similarity_panel

TICKS = (0, 0.25, 0.5, 0.75, 1)
FEWEST_IMAGES = 20  # a reliability bin with fewer is noise and is not drawn


def draw(results: Results, folder: Path) -> list[Picture]:
    """Draw loss and accuracy along lam (the paper's Figures 5 and 10), calibration (11) and similarity as PNG files."""
    name = DATASETS[results["config"]["dataset"]]
    jobs = [
        ("test-loss.png", _along(results, "test", "loss", f"{name}: test loss between A and B", "cross-entropy")),
        ("test-top1.png", _along(results, "test", "top1", f"{name}: test accuracy between A and B", "top-1 accuracy")),
        ("train-loss.png", _along(results, "train", "loss", f"{name}: training loss between A and B", "cross-entropy")),
        ("reliability.png", _reliability(results, f"{name}: are confident answers right?")),
    ]
    bands = " Bands: standard deviation over seeds." if len(results["seeds"]) > 1 else ""
    captions = [
        f"Test loss along the straight line from A to B (the paper's Figure 5).{bands}",
        "Top-1 accuracy along the same line (Figure 10).",
        "The same on training images of both halves.",
        "Share of right answers against confidence, on test images, averages at lam = 0.5 (Figure 11): above the "
        f"diagonal a model is less sure than it could be. Bins with fewer than {FEWEST_IMAGES} images are left out.",
    ]
    if all("similarity" in seed for seed in results["seeds"]):  # files of earlier versions do not know it
        found = [seed["similarity"] for seed in results["seeds"]]
        jobs.append(("similarity.png", similarity_panel(found, f"{name}: how alike A and B respond")))
        captions.append(
            "How alike what A and B compute is, on calibration images, before norms and nonlinearities: the mean "
            "correlation of units with the same number, before and after alignment, and CKA, which does not see their "
            "order."
        )
    pictures = []
    for (file, panel), caption in zip(jobs, captions, strict=True):
        save_lines(folder / file, [panel])
        pictures.append(Picture(caption, folder / file))
    return pictures


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
    if (
        part == "test" and "all" in results["seeds"][0]["rows"]
    ):  # on its own training images that model is near zero, far below everything else
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
        if names[0] not in results["seeds"][0]["reliability"]:
            continue
        pooled = [seed["reliability"][name] for seed in results["seeds"] for name in names]
        bins = {key: np.sum([one[key] for one in pooled], axis=0) for key in ("count", "confidence", "accuracy")}
        kept = bins["count"] >= FEWEST_IMAGES
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
