"""One folder a round: the global model, the strategies' state and a page of facts; read without pickle.

``round-000003/`` holds ``model.safetensors`` (the state dict, ready for ``safetensors.torch.load_file``),
``state.safetensors`` and ``round.json``. It is written under another name and renamed when whole, so that a process
that is killed leaves the round before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedrebasin.errors import UsageError, first_line

#: Folders that are kept: the newest, and the one before it.
KEPT = 2
_FOLDER = re.compile(r"round-(\d{6,})")
_MODEL, _STATE, _FACTS = "model.safetensors", "state.safetensors", "round.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run has come to after a round.

    Attributes
    ----------
    round : int
        0 before the first.
    model : ArrayRecord
    arrays : dict of str to ndarray
        All other arrays, by flat names.
    facts : dict
        What JSON holds: metrics, numbers, the order of the model's keys.
    """

    round: int
    model: ArrayRecord
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


@contextmanager
def hold_folder(folder: Path | None) -> Iterator[None]:
    """Make the folder, hold it for one run, and clear away what killed processes left half written.

    The lock ends with the process, however that ends; Windows has none.

    Raises
    ------
    UsageError
        If it cannot be made or written to, or another run holds it.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"checkpoint_dir={str(folder)!r} cannot be written ({first_line(error)}); give a folder that can"
        ) from error
    with _locked(folder):
        for partial in folder.glob(".round-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        for file in folder.glob(".*.json.*.partial"):
            file.unlink(missing_ok=True)
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):  # Windows has no such locks, and opens no folder
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"checkpoint_dir: another run writes to {str(folder)!r}; wait for its end, or give a folder to each run"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def check_storable(arrays: ArrayRecord) -> None:
    """Refuse a model that no checkpoint can hold before a round is lost by it."""
    for name, array in arrays.items():
        if array.dtype == "complex128":
            raise UsageError(
                f"checkpoint_dir: {name!r} is complex128, which safetensors files cannot hold; use a model in "
                "complex64, or leave checkpoint_dir out"
            )


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the round's folder, whole or not at all, and drop all but the newest two.

    Raises
    ------
    OSError
        If the disk is full or the folder has gone.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> model = ArrayRecord({"weight": Array(np.ones((2, 3), np.float32))})
    >>> with TemporaryDirectory() as name:
    ...     save_checkpoint(Path(name), Checkpoint(1, model, {}, {}))
    ...     load_checkpoint(Path(name)).round
    1
    """
    name = f"round-{checkpoint.round:06d}"
    partial = folder / f".{name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_arrays(partial / _MODEL, {key: array.numpy() for key, array in checkpoint.model.items()})
        _write_arrays(partial / _STATE, checkpoint.arrays)
        facts = {"round": checkpoint.round, "keys": list(checkpoint.model), **checkpoint.facts}
        _write(partial / _FACTS, json.dumps(facts, indent=1).encode())
        whole = folder / name
        if whole.exists():
            shutil.rmtree(whole)
        partial.rename(whole)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest round, or return None where there is none.

    Raises
    ------
    UsageError
        If a file is missing, cut off or not what it should be; nothing in a file is ever executed.
    """
    folders = _folders(folder)
    if not folders:
        return None
    newest = folders[-1]
    try:
        facts = json.loads((newest / _FACTS).read_text(encoding="utf-8"))
        model, arrays = load_file(newest / _MODEL), load_file(newest / _STATE)
        keys, number = facts.pop("keys"), facts.pop("round")
        if sorted(keys) != sorted(model) or number != int(newest.name.removeprefix("round-")):
            raise ValueError("its files are not of one round")
        record = ArrayRecord()
        for key in keys:
            record[key] = Array(model[key])
        return Checkpoint(number, record, arrays, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UsageError(
            f"checkpoint_dir: {str(newest)!r} cannot be read ({first_line(error)}); remove that folder to go on from "
            "the round before"
        ) from error


def _folders(folder: Path) -> list[Path]:
    found = [entry for entry in folder.iterdir() if _FOLDER.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("round-")))


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    try:
        save_file({name: np.array(values, order="C") for name, values in arrays.items()}, path)
    except SafetensorError as error:  # its own word for a full disk
        raise OSError(str(error)) from error
    with path.open("r+b") as file:  # Windows syncs only what can be written
        os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the renaming last through a power cut, where the system can: Windows opens no folder."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
