"""Result files: what was measured, and all that is needed to measure it again."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedrebasin.errors import UsageError
from fedrebasin.whole_file import whole_file

#: distributions whose version can change a number
PACKAGES = ("fedrebasin", "torch", "numpy", "scipy", "flwr", "flwr-datasets", "scikit-learn")


def provenance(command: str, seeds: Sequence[int], started: float) -> dict[str, Any]:
    """Describe a run: command, commit, versions, hardware, seeds, seconds and date.

    Parameters
    ----------
    command : str
        The command line that makes these results again.
    seeds : sequence of int
        Every seed that was run.
    started : float
        ``time.time()`` at the start of the run, in seconds.

    Returns
    -------
    dict
        ``commit`` is ``"unknown"`` where the package does not lie in a git checkout; ``dirty`` says whether
        the checkout held changes; ``hardware["gpu"]`` is None without one.

    Examples
    --------
    >>> sorted(provenance("fedrebasin compare", [0, 1], time.time()))
    ['command', 'commit', 'date', 'dirty', 'hardware', 'seconds', 'seeds', 'versions']
    """
    commit, dirty = _commit()
    return {
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
        "seeds": [int(seed) for seed in seeds],
        "seconds": round(time.time() - started, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results`` as JSON, whole or not at all; NaN and infinities become null.

    Tensors and arrays are written as lists, NumPy's scalars as numbers, paths as text.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.json"
    >>> save_results(path, {"loss": [0.5, float("nan")]})
    >>> load_results(path)
    {'loss': [0.5, None]}
    """
    write_whole(path, json.dumps(_plain(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def load_results(path: Path) -> dict[str, Any]:
    """Read a file that ``save_results`` wrote.

    Raises
    ------
    UsageError
        If there is no such file, or it holds no JSON object.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"results: cannot read {path} ({error.strerror}); give the results.json of a run") from error
    except ValueError as error:
        raise UsageError(f"results: expected a JSON object in {path}; {error}") from error
    if not isinstance(results, dict):
        raise UsageError(f"results: expected a JSON object in {path}; got {type(results).__name__}")
    return results


def load_experiment(path: Path, experiment: str, dataset: str | None = None) -> dict[str, Any]:
    """Read the results of ``fedrebasin reproduce`` that are drawn again.

    Raises
    ------
    UsageError
        If they are of something else, or of another data set than ``dataset``.
    """
    found = load_results(path)
    if found.get("experiment") != experiment or not {"config", "provenance"} < set(found):
        kind = found.get("experiment") or found.get("kind") or "nothing that is known"
        raise UsageError(
            f"--redraw: expected results of reproduce {experiment}; {path} holds those of {kind}; "
            "give the results.json of such a run"
        )
    if dataset is not None and found["config"]["dataset"] != dataset:
        raise UsageError(f"--redraw: expected results of {dataset}; {path} holds those of {found['config']['dataset']}")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to a file beside ``path`` and move it there, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def summarise(values: Sequence[float | None]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (0 for one value) and number of the values that are finite.

    Examples
    --------
    >>> summarise([1.0, 3.0, None])
    (2.0, 1.4142135623730951, 2)
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return math.nan, math.nan, 0
    return float(np.mean(finite)), float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0, len(finite)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def _commit() -> tuple[str, bool | None]:
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=True
        )
        return answer.stdout.strip()

    try:
        # an installed copy may lie inside some other project's repository: its commit would be a lie
        if git("ls-files", Path(__file__).name) == "":
            return "unknown", None
        return git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no") != ""
    except (OSError, subprocess.SubprocessError):
        return "unknown", None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory-gib": _memory(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
