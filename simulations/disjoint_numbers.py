"""The numbers of the experiment by row, curve and seed, and the names that readers see."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedrebasin.simulations.results import summarise

Results = Mapping[str, Any]

#: row of the results -> what the reader calls it, in the order of the table
ROWS = {
    "plain": "plain average",
    "plain+temperature": "plain average + temperature (labels)",
    "plain+reset": "plain average + BatchNorm reset",
    "plain+repair": "plain average + REPAIR",
    "plain+rescale": "plain average + RESCALE",
    "plain+reshift": "plain average + RESHIFT",
    "plain+closed-form": "plain average + REPAIR in closed form",
    "plain+regmean": "plain average + RegMean",
    "plain+least-squares": "plain average + least squares",
    "plain+least-squares-probabilities": "plain average + least squares to probabilities",
    "plain+least-squares+distill": "plain average + least squares + distillation",
    "plain+distill": "plain average + distillation",
    "aligned": "aligned average",
    "aligned+temperature": "aligned average + temperature (labels)",
    "aligned+reset": "aligned average + BatchNorm reset",
    "aligned+repair": "aligned average + REPAIR",
    "aligned+rescale": "aligned average + RESCALE",
    "aligned+reshift": "aligned average + RESHIFT",
    "aligned+closed-form": "aligned average + REPAIR in closed form",
    "aligned+regmean": "aligned average + RegMean",
    "aligned+least-squares": "aligned average + least squares",
    "aligned+least-squares-probabilities": "aligned average + least squares to probabilities",
    "aligned+least-squares+distill": "aligned average + least squares + distillation",
    "aligned+distill": "aligned average + distillation",
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


def in_precision(config: Results) -> str:
    """What the networks were trained in, where it was asked for.

    >>> in_precision({"precision": "bfloat16"}), in_precision({})
    (' in bfloat16', '')
    """
    precision = config.get("precision", "auto")
    return f" in {precision}" if precision != "auto" else ""


def headline(results: Results) -> str:
    """The merge that the answer speaks of, fixed beforehand: with BatchNorm its reset, without norm no correction."""
    return "aligned+reset" if "aligned+reset" in results["seeds"][0]["rows"] else "aligned"


def per_seed(results: Results, row: str, part: str, key: str) -> list[float]:
    """One number of every seed; ``better-end`` and ``better-end+corrected`` are the better of A and B in it."""
    lower_is_better = key in ("loss", "ece")
    choose: Callable[[Sequence[float]], float] = min if lower_is_better else max
    names = {"better-end": ("a", "b"), "better-end+corrected": ("a+corrected", "b+corrected")}.get(row, (row,))
    return [choose([number(seed["rows"][name][part][key]) for name in names]) for seed in results["seeds"]]


def number(value: float | None) -> float:
    """NaN where the results hold null."""
    return math.nan if value is None else float(value)


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
