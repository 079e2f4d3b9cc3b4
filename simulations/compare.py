"""``fedrebasin compare``: strategies side by side in one run of Flower's simulation runtime, and the page about it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedrebasin.errors import UsageError
from fedrebasin.simulations.attendance import attendance, check_nodes
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.events import Event
from fedrebasin.simulations.handover import hand_over
from fedrebasin.simulations.interrupts import signals_raise
from fedrebasin.simulations.results import load_results, provenance, save_results
from fedrebasin.simulations.runtime import RunError, run_app
from fedrebasin.simulations.settings import Settings, resolve, to_run_config
from fedrebasin.simulations.silo import rows_of_nodes
from fedrebasin.simulations.site import Site
from fedrebasin.simulations.summary_page import write_page
from fedrebasin.simulations.training import select_device

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

    Parameters
    ----------
    options : Options
    on_event : callable
        Called with each line of progress of server and clients, and with ``phase`` events of this function.

    Raises
    ------
    UsageError
        For what the caller can mend, before anything starts.
    RunError
        If the run failed; nothing is written then but its log.
    """
    started = time.time()
    check_extra()
    device = str(select_device(options.settings.device))
    settings = resolve(replace(options.settings, device=device))
    check_nodes(settings, options.nodes)
    output = _free_folder(options.output, settings)
    _check_path(options.path, settings.data)
    if options.path is not None:
        on_event({"event": "phase", "text": f"loading {settings.data}"})
    data = load_dataset(settings.data, options.path)
    parts = _parts(settings, data, options.nodes)
    with signals_raise(), _staged(output) as hidden, _site() as site:
        raw = _run(settings, data, options.nodes, site, on_event)
        results = {
            "kind": "compare",
            "provenance": provenance(options.command, settings.seed_list, started),
            "settings": asdict(settings),
            "data": {"name": data.name, "source": data.source, "test": len(data.test_labels)},
            "nodes": options.nodes,
            "partition": parts,
            "runs": raw["runs"],
            "baselines": raw["baselines"],
        }
        save_results(hidden / "results.json", results)
        write_page(results, hidden)
    return output


def check_extra() -> None:
    """Refuse to start where a package of the extra ``simulation`` is missing."""
    missing = [package for module, package in MODULES.items() if find_spec(module) is None]
    if missing:
        raise UsageError(f'missing: {", ".join(missing)}; pip install "fedrebasin[simulation]"')


def _free_folder(output: Path | None, settings: Settings) -> Path:
    if output is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        output = Path("fedrebasin-results") / f"compare-{settings.data}-{settings.start.replace(':', '-')}-{stamp}"
    output = output.expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output: expected a new or empty folder; {output} is in use")
    return output


def _check_path(path: str | None, name: str) -> None:
    if path is None:
        return
    if name == "digits":
        raise UsageError("--data: digits come with scikit-learn and take no folder; leave --data out")
    if not Path(path).is_dir():
        raise UsageError(f"--data: expected a folder with Parquet files of {name}; there is no folder {path}")


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


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that takes its place in one step at the end, or vanishes."""
    made: list[Path] = []
    try:
        for folder in reversed([folder for folder in output.parents if not folder.exists()]):
            folder.mkdir()
            made.append(folder)
        hidden = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        _remove_empty(made)
        raise UsageError(f"--output: cannot make {output} ({error.strerror}); choose another folder") from error
    try:
        yield hidden
        hidden.chmod(0o755)  # mkdtemp's folders are closed to others
        hidden.replace(output)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):  # somebody else has put something there meanwhile
            folder.rmdir()


def _parts(settings: Settings, data: Dataset, nodes: int) -> list[dict[str, Any]]:
    parts = []
    for seed in settings.seed_list:
        rows, _ = rows_of_nodes(settings, data, nodes, seed=seed)
        counts = [data.train_labels[part].bincount(minlength=data.classes).tolist() for part in rows]
        parts.append({"seed": seed, "rows_of_class": counts})
    return parts


def _run(
    settings: Settings, data: Dataset, nodes: int, site: Site, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    data_file, ends, results_file = site.folder / "data.safetensors", site.folder / "ends", site.folder / "results.json"
    hand_over(data, data_file)
    ends.mkdir()
    actors = min(nodes, os.cpu_count() or 1)
    federation: dict[str, int | float] = {"client-resources-num-cpus": 1, "init-args-num-cpus": actors}
    if settings.device != "cpu":
        federation |= {"client-resources-num-gpus": round(1 / actors, 3), "init-args-num-gpus": 1}
    paths = {"data-file": data_file, "ends-folder": ends, "progress-file": site.progress, "results-file": results_file}
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
    _check_whole(raw, settings, nodes, site)
    return raw


def _check_whole(raw: dict[str, Any], settings: Settings, nodes: int, site: Site) -> None:
    """Every seed and strategy is there with every round, and each round has all its replies and no failure."""
    expected = {(seed, name) for seed in settings.seed_list for name in settings.line_up}
    found = {(run["seed"], run["strategy"]) for run in raw["runs"]}
    for run in raw["runs"]:
        rounds = [row["round"] for row in run["rounds"]]
        whole = all(
            row["replies"] == len(attendance(settings, nodes, seed=run["seed"], server_round=row["round"]))
            and not row["failures"]
            for row in run["rounds"][1:]
        )
        if rounds != list(range(settings.rounds + 1)) or not whole:
            found.discard((run["seed"], run["strategy"]))
    if found != expected:
        raise RunError(f"the results lack {sorted(expected - found)}; the log is {site.log}")
