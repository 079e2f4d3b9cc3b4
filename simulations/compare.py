"""``fedrebasin compare``: strategies side by side in one run of Flower's simulation runtime, and the page about it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedrebasin.errors import UsageError
from fedrebasin.simulations.attendance import attendance, check_nodes
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.devices import usable_device
from fedrebasin.simulations.events import Event
from fedrebasin.simulations.handover import hand_over
from fedrebasin.simulations.interrupts import Interrupted, signals_raise
from fedrebasin.simulations.named_data import check_path, load_named
from fedrebasin.simulations.output_folder import free_folder, staged
from fedrebasin.simulations.results import load_results, provenance, save_results
from fedrebasin.simulations.runtime import RunError, run_app
from fedrebasin.simulations.settings import Settings, resolve, to_run_config
from fedrebasin.simulations.silo import rows_of_nodes
from fedrebasin.simulations.site import Site
from fedrebasin.simulations.summary_page import write_page

APP = Path(__file__).resolve().parent / "app"
MODULES = {
    "ray": "flwr[simulation]",
    "flwr_datasets": "flwr-datasets",
    "sklearn": "scikit-learn",
    "pyarrow": "pyarrow",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
}


@dataclass(frozen=True)
class Options:
    """A comparison, where its data lies and where its results go; without ``output`` a new folder is named."""

    settings: Settings
    nodes: int = 2
    path: str | None = None
    output: Path | None = None
    command: str = "fedrebasin compare"


def compare(options: Options, *, on_event: Callable[[Event], None] = lambda event: None) -> Path:
    """Run the comparison and return the folder with ``results.json``, the plots and ``report.html``.

    A node that several strategies send the same weights, bit for bit, trains them once in each seed and recipe.

    Parameters
    ----------
    options : Options
    on_event : callable
        Called with each line of progress of server and clients, and with ``phase`` events of this function.

    Raises
    ------
    UsageError
        For what the caller can mend, before anything starts.
    RunError, Interrupted
        If the run failed, or a signal ended it. Seeds that were finished are in the folder all the same, and the
        message says so; without any, nothing is written but the log of a run that failed.
    """
    started = time.time()
    check_extra()
    device = str(usable_device(options.settings.device))
    settings = resolve(replace(options.settings, device=device))
    check_nodes(settings, options.nodes)
    output = free_folder(options.output, settings)
    check_path(settings.data, options.path)
    if options.path is not None:
        on_event({"event": "phase", "text": f"loading {settings.data}"})
    data = load_named(settings.data, options.path)
    parts = [_part(settings, data, options.nodes, seed) for seed in settings.seed_list]
    failure: Interrupted | RunError | None = None
    with signals_raise(), staged(output) as hidden:
        raw_file = hidden / "raw.json"
        try:
            with _site() as site:
                _run(settings, data, options.nodes, site, raw_file, on_event)
        except (Interrupted, RunError) as error:
            failure = error
        results = _results(raw_file, settings, data, parts, options.nodes)
        if failure is not None and not results["runs"]:
            raise failure
        raw_file.unlink()
        seeds = [part["seed"] for part in results["partition"]]
        results["provenance"] = provenance(options.command, seeds, started)
        save_results(hidden / "results.json", results)
        write_page(results, hidden)
    if failure is not None:
        done = ", ".join(map(str, seeds))
        failure.args = (f"{failure}; finished before, and kept in {output}: seed {done}",)
        raise failure
    return output


def check_extra() -> None:
    """Refuse to start where a package of the extra ``simulation`` is missing, or what ends a run's processes."""
    if sys.platform == "win32":
        raise UsageError("compare: expected Linux or macOS, where a run's processes are found and ended; got Windows")
    missing = [package for module, package in MODULES.items() if find_spec(module) is None]
    if missing:
        raise UsageError(f'missing: {", ".join(missing)}; pip install "fedrebasin[simulation]"')


@contextmanager
def _site() -> Iterator[Site]:
    """A folder for the run, of which only the log of a failed run is kept."""
    site = Site(Path(tempfile.mkdtemp(prefix="fedrebasin-")))
    try:
        yield site
    except RunError:
        site.keep_only_the_log()
        raise
    except BaseException:
        shutil.rmtree(site.folder, ignore_errors=True)
        raise
    shutil.rmtree(site.folder, ignore_errors=True)


def _results(
    raw_file: Path, settings: Settings, data: Dataset, parts: list[dict[str, Any]], nodes: int
) -> dict[str, Any]:
    """What the run measured on the seeds that it was through with."""
    raw: dict[str, Any] = load_results(raw_file) if raw_file.exists() else {"runs": [], "baselines": []}
    whole = [seed for seed in settings.seed_list if not _lacking(raw, settings, nodes, seed)]
    return {
        "kind": "compare",
        "settings": asdict(replace(settings, seeds=",".join(map(str, whole)))),
        "data": {"name": data.name, "source": data.source, "test": len(data.test_labels)},
        "nodes": nodes,
        "unfinished": [seed for seed in settings.seed_list if seed not in whole],
        "partition": [part for part in parts if part["seed"] in whole],
        "runs": [run for run in raw["runs"] if run["seed"] in whole],
        "baselines": [entry for entry in raw["baselines"] if entry["seed"] in whole],
    }


def _part(settings: Settings, data: Dataset, nodes: int, seed: int) -> dict[str, Any]:
    rows, _ = rows_of_nodes(settings, data, nodes, seed=seed)
    counts = [data.train_labels[part].bincount(minlength=data.classes).tolist() for part in rows]
    return {"seed": seed, "rows_of_class": counts}


def _run(
    settings: Settings, data: Dataset, nodes: int, site: Site, results_file: Path, on_event: Callable[[Event], None]
) -> None:
    data_file = site.folder / "data.safetensors"
    hand_over(data, data_file)
    actors = min(nodes, os.cpu_count() or 1)
    federation: dict[str, int | float] = {"client-resources-num-cpus": 1, "init-args-num-cpus": actors}
    if settings.device != "cpu":
        federation |= {"client-resources-num-gpus": round(1 / actors, 3), "init-args-num-gpus": 1}
    paths = {
        "data-file": data_file,
        "trainings-folder": site.folder / "trainings",
        "progress-file": site.progress,
        "results-file": results_file,
    }
    on_event({"event": "phase", "text": "starting Flower's simulation runtime"})
    run_app(
        APP,
        site,
        run_config={**to_run_config(settings), **{key: str(path) for key, path in paths.items()}},
        nodes=nodes,
        federation=federation,
        on_event=on_event,
    )
    if not results_file.exists():
        raise RunError(f"the run wrote no results; the log is {site.log}")
    raw = load_results(results_file)
    lacking = [one for seed in settings.seed_list for one in _lacking(raw, settings, nodes, seed)]
    if lacking:
        raise RunError(f"the results lack {lacking}; the log is {site.log}")


def _lacking(raw: dict[str, Any], settings: Settings, nodes: int, seed: int) -> list[tuple[int, str]]:
    """The strategies of a seed that are not there with every round, each with all its replies and no failure."""
    lacking = dict.fromkeys(settings.line_up)
    for run in raw["runs"]:
        rounds = [row["round"] for row in run["rounds"]]
        whole = all(
            row["replies"] == len(attendance(settings, nodes, seed=seed, server_round=row["round"]))
            and not row["failures"]
            for row in run["rounds"][1:]
        )
        if run["seed"] == seed and rounds == list(range(settings.rounds + 1)) and whole:
            lacking.pop(run["strategy"], None)
    return [(seed, name) for name in sorted(lacking)]
