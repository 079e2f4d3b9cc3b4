"""The README's tables of ``selection.py``: what is kept, what the ends alone add, what measures agreement best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fedrebasin.simulations.disjoint_numbers import spread_text

Result = Mapping[str, Any]
Rows = list[list[str]]
ENDS = ("a", "b")


def kept(result: Result) -> tuple[Sequence[str], Rows]:
    """How often the best is kept, and what is lost when it is not, beside what is kept without selection."""
    columns = "width, split|corrections|kept by|best by loss|best by top-1|loss lost|points lost".split("|")
    rows = []
    for case, found in _cases(result):
        for name, corrections in result["sets"].items():
            if found[0]["width"] < 512 and name == "all":
                continue
            models = _competitors(corrections)
            for label, labels in (("loss, labels", "labels"), ("agreement, no labels", "no labels")):
                cells = _lost(found, models, partial(_kept, name=name, labels=labels))
                rows.append([case, name, label, *cells])
            if name != "all":
                always = f"aligned+{corrections[-1]}"
                rows.append(
                    [case, name, f"none: always {always}", *_lost(found, models, partial(_always, name=always))]
                )
    return columns, rows


def alone(result: Result) -> tuple[Sequence[str], Rows]:
    """The ends as candidates, by loss, with REPAIR as the one correction."""
    columns = [
        "width, split, images",
        "the best is an end",
        "ends left out",
        "ends as any candidate",
        "ends by the rule",
    ]
    rows = []
    for case, found in _cases(result, calibration="server"):
        models = _competitors(("repair",))
        best = sum(_lowest(row, models) in ENDS for row in found)
        cells = []
        for ends in ("none", "equal", "rule"):
            _, _, loss, points = _lost(found, models, partial(_kept, name="repair", ends=ends))
            count = sum(_kept(row, name="repair", ends=ends) in ENDS for row in found)
            cells.append(f"{loss} / {points}" + ("" if ends == "none" else f"; kept {count}"))
        rows.append([f"{case}, {found[0]['images']}", f"{best} of {len(found)}", *cells])
    return columns, rows


def agreement(result: Result) -> tuple[Sequence[str], Rows]:
    """Measures side by side: how often the lowest is the best by test loss, and points lost."""
    cases = [(case, found) for case, found in _cases(result, calibration="server", images=347) if "512" in case]
    groups = [(case, found, name) for case, found in cases for name in ("repair", "all")]
    columns = ["measure", *(f"{case}, {name}" for case, _, name in groups)]
    rows = []
    for place, measure in enumerate(result["columns"]):
        if measure.startswith("test"):
            continue
        line = [measure + (" (labels)" if measure == "loss" else "")]
        for _, found, name in groups:
            models = [model for model in _competitors(result["sets"][name]) if model not in ENDS]

            best, _, loss, points = _lost(found, models, partial(_lowest, models=models, place=place))
            line.append(f"{best}; {loss}; {points}")
        rows.append(line)
    return columns, rows


def rounds(result: Result) -> tuple[Sequence[str], Rows]:
    """Test loss and accuracy over rounds, and how often a model alone was kept."""
    columns = "clients|chosen from|loss, top-1 % before|round 1|round 3|round 6|kept alone".split("|")
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in result["rounds"]:
        start = f", start trained for {row['trained']} epochs" if row["trained"] else ""
        case = f"{row['nodes']}, {row['partition']}, {row['epochs']} epochs a round{start}"
        groups.setdefault((case, row["variant"]), []).append(row)
    rows = []
    for (case, variant), found in groups.items():
        cells = [
            f"{spread_text([row['loss'][place] for row in found])} / "
            f"{spread_text([row['top1'][place] for row in found], percent=True)}"
            for place in (0, 1, 3, 6)
        ]
        names = Counter(name.split()[0] for row in found for name in row["kept"] if not name.startswith("aligned"))
        total = sum(len(row["kept"]) for row in found)
        alone = ", ".join(f"{name} {count} of {total}" for name, count in sorted(names.items()))
        rows.append([case, variant, *cells, alone or "-"])
    return columns, rows


def votes(result: Result) -> tuple[Sequence[str], Rows]:
    """How often the clients' votes keep the best, beside what is kept without them."""
    columns = "clients|corrections|kept by|best by loss|best by top-1|loss lost|points lost".split("|")
    rows = []
    groups: dict[str, list[Result]] = {}
    for row in result["rows"]:
        groups.setdefault(f"{row['nodes']}, {row['partition']}", []).append(row)
    for case, found in groups.items():
        for name, corrections in result["sets"].items():
            models = [model for model in _competitors(corrections) if model not in ENDS]

            def voted(row: Result, name: str = name) -> str:
                return str(row["kept"][name])

            rows.append([case, name, "votes", *_lost(found, models, voted)])
            for always in ("aligned", *(f"aligned+{one}" for one in corrections)):
                rows.append(
                    [case, name, f"none: always {always}", *_lost(found, models, partial(_always, name=always))]
                )
    return columns, rows


def _cases(result: Result, **chosen: Any) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for row in result["rows"]:
        if all(row[key] == value for key, value in chosen.items()):
            whose = "" if row["calibration"] == "server" else ", images of the clients"
            case = f"{row['width']}, {100 * row['held']:.0f}/{100 - 100 * row['held']:.0f}{whose}"
            groups.setdefault(case, []).append(row)
    return list(groups.items())


def _competitors(corrections: Sequence[str]) -> list[str]:
    paths = [f"{path}{end}" for path in ("plain", "aligned") for end in ("", *(f"+{one}" for one in corrections))]
    return [*paths, *ENDS]


def _always(_: Result, *, name: str) -> str:
    return name


def _kept(row: Result, *, name: str, labels: str = "labels", ends: str = "rule") -> str:
    return str(row["kept"][name][labels][ends])


def _lowest(row: Result, models: Sequence[str], place: int = 0) -> str:
    return min(models, key=lambda model: row["figures"][model][place])


def _lost(rows: Sequence[Result], models: Sequence[str], pick: Callable[[Result], str]) -> list[str]:
    """Of how many rows the pick is the best by test loss and by top-1, and what it loses to each."""
    by_loss = by_top1 = 0
    losses, points = [], []
    for row in rows:
        loss, top1 = row["figures"][pick(row)][:2]
        losses.append(loss - min(row["figures"][model][0] for model in models))
        points.append(max(row["figures"][model][1] for model in models) - top1)
        by_loss, by_top1 = by_loss + (losses[-1] == 0), by_top1 + (points[-1] == 0)
    lost = spread_text(losses), spread_text(points, percent=True).rstrip("%")
    return [f"{by_loss} of {len(rows)}", f"{by_top1} of {len(rows)}", *lost]


TABLES = {
    "selection": kept,
    "selection-alone": alone,
    "selection-agreement": agreement,
    "selection-rounds": rounds,
    "votes": votes,
}
