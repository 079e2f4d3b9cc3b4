"""The files that ``fedrebasin merge`` is given: opened, compared, and read through once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from fedrebasin.errors import SpecMismatchError, UsageError
from fedrebasin.spec import PermutationSpec
from fedrebasin.stored import Entry, StoredState


def open_inputs(paths: Sequence[Path], *, scratch: Path | None = None) -> list[StoredState]:
    """Open files of one architecture; only their headers are read.

    Raises
    ------
    UsageError
        If there are fewer than two.
    RebasinError
        If one is no safetensors file.
    SpecMismatchError
        If names or shapes differ, or a tensor is of integers in one file only.
    """
    if len(paths) < 2:
        raise UsageError(f"files: expected two safetensors files or more; got {len(paths)}")
    states = [StoredState(path, scratch=scratch) for path in paths]
    first = states[0]
    for state in states[1:]:
        odd = min(set(state) ^ set(first), default=None)
        if odd is not None:
            raise SpecMismatchError(f"{state.path}: expected the tensors of {first.path}; {odd!r} is in one only")
        for name, entry in first.entries.items():
            other = state.entries[name]
            if other.shape != entry.shape:
                raise SpecMismatchError(
                    f"{state.path}: expected {name!r} as {entry.shape}, as in {first.path}; got {other.shape}"
                )
            kinds = other.dtype.is_floating_point, entry.dtype.is_floating_point
            if kinds[0] != kinds[1] or (not kinds[0] and other.dtype != entry.dtype):
                raise SpecMismatchError(
                    f"{state.path}: expected {name!r} as {entry.dtype}, as in {first.path}; got {other.dtype}"
                )
    return states


def check_values(states: Sequence[StoredState], spec: PermutationSpec) -> list[str]:
    """Read every file once: returns the SHA-256 of each, and refuses what cannot be averaged.

    Raises
    ------
    SpecMismatchError
        If a tensor holds a NaN, a parameter an infinity, or a table of integers (not a single counter) that no
        permutation moves differs between files.
    """
    for state in states:
        spec.check_state(state.described, str(state.path))
    buffers = set(spec.buffers)
    digests = [_digest(state, buffers) for state in states]
    moved = {axis.name for axes in spec.tied.values() for axis in axes}
    for name, entry in states[0].entries.items():
        if _has_average(entry) or entry.numel < 2 or name in moved:
            continue
        table = states[0][name]
        for state in states[1:]:
            if not torch.equal(state[name], table):
                raise SpecMismatchError(
                    f"{state.path}: expected the integers of {name!r} as in {states[0].path}; integers have no average"
                )
    return digests


def _digest(state: StoredState, buffers: set[str]) -> str:
    digest = hashlib.sha256(state.header)
    for name, entry in sorted(state.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        for chunk in state.chunks(name):
            digest.update(chunk.view(torch.uint8).numpy().data)
            if not _has_average(entry):
                continue
            values = chunk.float() if entry.dtype.itemsize == 1 else chunk
            wrong = values.isnan() if name in buffers else ~values.isfinite()
            if bool(wrong.any()):
                raise SpecMismatchError(f"{state.path}: {name!r} holds a NaN or an infinity; leave this model out")
    return digest.hexdigest()


def _has_average(entry: Entry) -> bool:
    return entry.dtype.is_floating_point or entry.dtype.is_complex
