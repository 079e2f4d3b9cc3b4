"""The tables of README and guides, from the committed results: ``python -m fedrebasin.simulations.readme FILE ...``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrebasin.simulations.bench.tables import TABLES
from fedrebasin.simulations.bench.tables_distance import attempts, distance
from fedrebasin.simulations.competitors import label_of
from fedrebasin.simulations.disjoint_numbers import ROWS, in_precision, number, per_seed, spread_text
from fedrebasin.simulations.results import load_results, summarise, write_whole
from fedrebasin.simulations.settings import join_round
from fedrebasin.simulations.similarity_plot import LINES
from fedrebasin.simulations.summary import baseline_rows, by_round, megabytes, percent, plain, strategies

RESULTS = Path(__file__).resolve().parent / "results"
_MARKED = re.compile(r"(<!-- table: (?P<name>[a-z0-9. -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ROUNDS = (1, 2, 5)
_ZOO = """
squeezenet1_1 shufflenet_v2_x1_0 mobilenet_v2 efficientnet_b0 googlenet densenet121 resnet18 resnext50_32x4d
inception_v3 swin_t convnext_tiny maxvit_t vit_b_16 vit_h_14
""".split()


def render(text: str, folder: Path = RESULTS) -> str:
    """Replace what stands between ``<!-- table: disjoint NAME ... -->`` and ``<!-- end -->`` by fresh tables.

    ``disjoint`` takes results of the disjoint experiment side by side, ``calibration-errors`` another of their
    measures, ``similarity`` how alike their ends respond layer by layer, ``rounds`` those of comparisons below each
    other, ``attendance`` all rounds of those where nodes come and go, ``federated`` first rounds side by side with the
    bytes of queries, ``zoo`` some rows of ``fedrebasin inspect --zoo``, ``distance`` how far corrected merges are from
    the ensemble, ``attempts`` what might bring them nearer, and each kind of ``bench/tables.py`` the runs of one
    benchmark; every NAME is a folder of ``simulations/results/``.

    Examples
    --------
    >>> render("no table here")
    'no table here'
    """

    def table(match: re.Match[str]) -> str:
        kind, *names = match["name"].split()
        results = [load_results(folder / name / "results.json") for name in names]
        rendered = _markdown(*TABLES[kind](_joined(results))) if kind in TABLES else _KINDS[kind](results)
        return f"{match[1]}{rendered}\n{match[3]}"

    return _MARKED.sub(table, text)


def _joined(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Several runs of one benchmark as one: its lists one after the other."""
    lists = [key for key, value in results[0].items() if isinstance(value, list)]
    return {**results[0], **{key: [row for one in results for row in one[key]] for key in lists}}


def _disjoint(results: Sequence[Mapping[str, Any]]) -> str:
    return _models("test loss / top-1 %", results, _loss_and_accuracy)


def _calibration_errors(results: Sequence[Mapping[str, Any]]) -> str:
    return _models(
        "expected calibration error", results, lambda one, row: spread_text(per_seed(one, row, "test", "ece"))
    )


def _models(title: str, results: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any], str], str]) -> str:
    """A row for each model of the disjoint experiment that one of the results has, a column for each of the results."""
    rows = []
    for row, label in ROWS.items():
        has = [row in one["seeds"][0]["rows"] for one in results]
        if any(has):
            name = f"**{label}**" if row.startswith("aligned") else label
            rows.append([name, *(cell(one, row) if there else "-" for one, there in zip(results, has, strict=True))])
    return _markdown([title, *(_title(one["config"]) for one in results)], rows)


def _loss_and_accuracy(results: Mapping[str, Any], row: str) -> str:
    loss = spread_text(per_seed(results, row, "test", "loss"))
    return f"{loss} / {spread_text(per_seed(results, row, 'test', 'top1'), percent=True)}"


def _similarity(results: Sequence[Mapping[str, Any]]) -> str:
    """How alike the ends respond, layer by layer; networks stand below each other, shallow ones leave columns empty."""
    depth = max(len(one["seeds"][0]["similarity"]["cka"]) for one in results)
    rows = []
    for one in results:
        pairs = [seed["similarity"] for seed in one["seeds"]]
        for line, (label, _) in LINES.items():
            cells = [spread_text([number(pair[line][layer]) for pair in pairs]) for layer in pairs[0][line]]
            bold = f"**{label}**" if line == "aligned" else label
            rows.append([_title(one["config"]), bold, *cells, *[""] * (depth - len(cells))])
    return _markdown(["network", "alike", *(f"layer {place + 1}" for place in range(depth))], rows)


def _title(config: Mapping[str, Any]) -> str:
    named = f"{config['dataset']}, {config['model']} of width {config['width']}, {config['epochs']} epochs"
    return named + in_precision(config)


def _rounds(results: Sequence[Mapping[str, Any]], *, baselines: bool = True) -> str:
    columns = ["data, start", "strategy", *(f"round {number}" for number in _ROUNDS), "MB sent"]
    rows = []
    for one in results:
        settings = one["settings"]
        where = f"{settings['data']}, {settings['start']}"
        if not settings["partition"].startswith("biased"):
            where += f", {settings['partition']}, {_epochs(settings)}"
        for name in strategies(one):
            cells = [percent(by_round(one, name, "accuracy", number)) for number in _ROUNDS]
            rows.append([where, _name(name), *cells, _sent(one, name)])
        for label, accuracies, losses in baseline_rows(one) if baselines else ():
            work = 1 if settings["start"] == "apart" else settings["rounds"]
            cells = [percent(accuracies) if number == work else "" for number in _ROUNDS]
            rows.append([where, f"{label} (loss {plain(losses)})", *cells, ""])
    return _markdown(columns, rows)


def _epochs(settings: Mapping[str, Any]) -> str:
    return f"{settings['epochs']} epoch{'s' if settings['epochs'] > 1 else ''}"


def _sent(results: Mapping[str, Any], strategy: str) -> str:
    sent = megabytes(results, strategy, results["settings"]["rounds"])
    return f"{summarise(sent)[0]:.1f}" if sent else ""


def _name(strategy: str) -> str:
    label = label_of(strategy)
    return f"**{label}**" if "rebasin" in strategy else label


def _attendance(results: Sequence[Mapping[str, Any]]) -> str:
    """Every round, and what it cost; a baseline stands below the round whose work it equals."""
    last = max(one["settings"]["rounds"] for one in results)
    columns = ["data, start", "strategy", *(f"round {number}" for number in range(1, last + 1)), "MB sent"]
    rows = []
    for one in results:
        settings = one["settings"]
        where = f"{settings['data']}, {settings['start']}"
        where += f", absent {settings['absent']:g}" if settings["absent"] else ""
        numbers = range(1, settings["rounds"] + 1)
        for name in strategies(one):
            cells = [percent(by_round(one, name, "accuracy", number)) for number in numbers]
            rows.append([where, _name(name), *cells, *[""] * (last - len(cells)), _sent(one, name)])
        for label, accuracies, losses in baseline_rows(one):
            number = join_round(settings["start"]) if "joins" in label else settings["rounds"]
            cells = [percent(accuracies) if column == number else "" for column in range(1, last + 1)]
            rows.append([where, f"{label} (loss {plain(losses)})", *cells, ""])
    return _markdown(columns, rows)


def _ends(results: Sequence[Mapping[str, Any]]) -> str:
    """The last round alone, one column for each partition and number of local epochs."""
    columns, rows = ["test accuracy after the last round, %"], dict[str, dict[int, str]]()
    for place, one in enumerate(results):
        settings = one["settings"]
        columns.append(f"{settings['data']}, {settings['partition']}, {_epochs(settings)}")
        for name in strategies(one):
            rows.setdefault(_name(name), {})[place] = percent(by_round(one, name, "accuracy", settings["rounds"]))
        for label, accuracies, _ in baseline_rows(one):
            rows.setdefault(label, {})[place] = percent(accuracies)
    return _markdown(columns, _cells(rows, len(results)))


def _federated(results: Sequence[Mapping[str, Any]]) -> str:
    columns, rows = ["test loss / top-1 % after round 1, kB of queries a client"], dict[str, dict[int, str]]()
    for place, one in enumerate(results):
        settings = one["settings"]
        network = f"{settings['model']} of width {settings['width']}"
        columns.append(f"{settings['data']}, {network}, {one['nodes']} clients, {settings['partition']}")
        for name in strategies(one):
            cell = f"{plain(by_round(one, name, 'loss', 1))} / {percent(by_round(one, name, 'accuracy', 1))}"
            total = by_round(one, name, "rebasin-query-bytes", 1)[0]
            cell += f", {total / one['nodes'] / 1e3:,.0f} kB" if total else ""
            label = f"**{label_of(name)}**" if "+federated" in name else label_of(name)
            rows.setdefault(label, {})[place] = cell
        for label, accuracies, losses in baseline_rows(one):
            label = label.replace(f"{one['nodes']} clients", "the clients' logits")
            rows.setdefault(label, {})[place] = f"{plain(losses)} / {percent(accuracies)}"
    return _markdown(columns, _cells(rows, len(results)))


def _cells(rows: Mapping[str, Mapping[int, str]], columns: int) -> list[list[str]]:
    return [[label, *(row.get(place, "-") for place in range(columns))] for label, row in rows.items()]


def _zoo(results: Sequence[Mapping[str, Any]]) -> str:
    columns = "model|parameters|perms|log10 order|free share|export|trace|change|ops without a rule".split("|")
    rows = []
    for row in (row for one in results for row in one["rows"] if row["model"] in _ZOO):
        seconds = [f"{row[key]:.2f} s" for key in ("export-seconds", "trace-seconds")]
        change = f"{row['change']:.0e}" if row["change"] is not None else "-"
        numbers = [f"{row['parameters'] / 1e6:.1f} M", str(row["perms"]), f"{row['log10-order']:,.0f}"]
        free = percent([row["free-share"]]) + "%"
        rows.append([row["model"], *numbers, free, *seconds, change, str(len(row["notes"]))])
    return _markdown(columns, rows)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_KINDS: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "disjoint": _disjoint,
    "calibration-errors": _calibration_errors,
    "similarity": _similarity,
    "rounds": _rounds,
    "strategies": lambda results: _rounds(results, baselines=False),
    "attendance": _attendance,
    "ends": _ends,
    "federated": _federated,
    "zoo": _zoo,
    "distance": lambda results: _markdown(*distance(results)),
    "attempts": lambda results: _markdown(*attempts(results)),
}


def main() -> None:
    """Rewrite the tables of the pages that are named on the command line."""
    for path in map(Path, sys.argv[1:]):
        write_whole(path, render(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
