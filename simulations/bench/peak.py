"""The peak of this process's memory during a call, on Linux."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def start_peak() -> float:
    """Give back what is freed, let the peak start anew, and return what the process holds, in MB.

    >>> peak_above(start_peak()) < 1000
    True
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the system, so that it is not counted as held
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_above(before: float) -> float:
    """The peak since :func:`start_peak`, above what it returned, in MB."""
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024
