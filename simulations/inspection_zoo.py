"""``fedrebasin inspect --zoo``: every torchvision classifier up to 60 million parameters, and some beyond.

Each model has a process of its own, so that a crash costs one row and peak memory is that model's. The results
file is written after every row, and a second run goes on where the first one ended.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fedrebasin
from fedrebasin.errors import UsageError
from fedrebasin.simulations.inspection_zoo_row import Row, zoo_models
from fedrebasin.simulations.results import load_results, provenance, save_results

#: seconds after which a model counts as failed
_PATIENCE = 3600.0


@dataclass(frozen=True)
class ZooOptions:
    """Which models (all without names), and where the results go."""

    only: Sequence[str] = ()
    output: Path = Path("fedrebasin-results") / "inspect-zoo"
    seed: int = 0
    command: str = "fedrebasin inspect --zoo"
    progress: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr, flush=True))


def run_zoo(options: ZooOptions) -> dict[str, Any]:
    """Measure every model that ``options.output`` does not hold yet; returns the results.

    Raises
    ------
    UsageError
        If a name is unknown, the folder cannot be written, or it holds other rows, measured with other code.
    """
    names = _selected(options.only)
    path, code = options.output / "results.json", _code()
    earlier = {row["model"]: row for row in load_results(path)["rows"]} if path.exists() else {}
    rows = {
        name: row
        for name, row in earlier.items()
        if row["code"] == code and not (row["error"] and name in names)  # what failed is tried again
    }
    lost = [name for name, row in earlier.items() if name not in names and row["code"] != code]
    if lost:
        raise UsageError(
            f"--output: {path} holds rows of other code or versions ({', '.join(lost[:3])}); name a new folder"
        )
    _make_folder(options.output)
    started = time.time()
    for number, name in enumerate(names, 1):
        if name in rows:
            options.progress(f"{number}/{len(names)} {name}: measured earlier, used again")
            continue
        rows[name] = {**_in_a_process(name, options.seed), "code": code}
        _write(path, options, rows, started)
        options.progress(f"{number}/{len(names)} {name}: {_line(rows[name])}")
    return load_results(path)


def _selected(only: Sequence[str]) -> list[str]:
    known = zoo_models()
    odd = [name for name in only if name not in known]
    if odd:
        raise UsageError(f"--only: expected names among the {len(known)} models of the zoo; got {odd[0]!r}")
    return [name for name in known if not only or name in only]


def _write(path: Path, options: ZooOptions, rows: dict[str, Row], started: float) -> None:
    order = {name: number for number, name in enumerate(zoo_models())}
    facts = provenance(options.command, [options.seed], started)
    facts["versions"]["torchvision"] = metadata.version("torchvision")
    facts["seconds"] = round(sum(row["seconds"] for row in rows.values()), 1)  # of all rows, whichever run had them
    results = {
        "experiment": "inspect-zoo",
        "provenance": facts,
        "rows": sorted(rows.values(), key=lambda row: order[row["model"]]),
    }
    save_results(path, results)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output: expected a folder that can be written; {folder}: {error.strerror}") from error


def _in_a_process(name: str, seed: int) -> Row:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        call = [sys.executable, "-m", "fedrebasin.simulations.inspection_zoo_row", name, str(seed), str(target)]
        try:
            done = subprocess.run(
                call, env=_environment(), capture_output=True, text=True, check=False, timeout=_PATIENCE
            )
            said = (done.stderr.strip() or "nothing on stderr").splitlines()[-1]
            row = load_results(target) if target.exists() else {"error": f"exit status {done.returncode}: {said}"}
        except subprocess.TimeoutExpired:
            row = {"error": f"not done after {_PATIENCE:.0f} s"}
    empty = dict.fromkeys(
        "input device parameters perms log10-order free-share export-seconds trace-seconds change proof notes fixed "
        "start-mib peak-mib error".split()
    )
    return {"model": name, **empty, **row, "seconds": round(time.perf_counter() - started, 1)}


def _environment() -> dict[str, str]:
    """The process imports the fedrebasin that this one runs."""
    library = str(Path(fedrebasin.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH", "")]))}


def unusual(fixed: dict[str, int] | None) -> dict[str, int]:
    """Of the fixed axes, those that are no inputs, outputs, kernels, spatial axes, tables or numbers of parts.

    >>> unusual({"input": 1, "kernel or spatial": 4, "aten.sort": 2})
    {'aten.sort': 2}
    """
    usual = {
        "input",
        "output",
        "kernel",
        "spatial",
        "table",
        "side",
        "size",
    }  # side by side: which part, not which unit
    return {reason: count for reason, count in (fixed or {}).items() if not usual & set(re.findall(r"\w+", reason))}


def _line(row: Row) -> str:
    if row["error"]:
        return str(row["error"])
    proof = row["proof"] if row["change"] is None else f"change {row['change']:.0e}"
    return (
        f"{row['perms']} perms, log10 order {row['log10-order']:,.0f}, export {row['export-seconds']:.1f} s, "
        f"trace {row['trace-seconds']:.2f} s, {proof}"
    )


def _code() -> str:
    """Fingerprint of what decides a row: the core's code, this file's and the versions of torch and torchvision."""
    core = Path(fedrebasin.__file__).parent
    files = sorted(path for folder in ("", "axes", "rules") for path in (core / folder).glob("*.py"))
    files += sorted(Path(__file__).parent.glob("inspection*.py"))
    versions = f"{torch.__version__} {metadata.version('torchvision')}".encode()
    return hashlib.sha256(b"".join([versions, *(path.read_bytes() for path in files)])).hexdigest()[:16]
