"""Scales of a plot's y axis with ticks that people read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: shares that the scale of nines names
NINES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_LEAST = 1e-4  # nearer to 1 nothing is drawn: a share of 1 would lie at infinity


def log_scale(axis: Axes) -> None:
    """Logarithmic, with round numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    axis.yaxis.set_major_locator(
        LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5) if decades > 1 else (1, 2, 3, 5, 7))
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def nines_scale(axis: Axes) -> None:
    """Shares by the logarithm of what they lack: 98% is as far from 99% as 90% is from 95%."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = to_nines(np.asarray(axis.dataLim.intervaly))
    margin = 0.05 * (high - low)
    axis.set_yscale("function", functions=(to_nines, from_nines))
    axis.set_ylim(*from_nines(np.array([low - margin, high + margin])))
    axis.yaxis.set_major_locator(FixedLocator(NINES))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def to_nines(share: np.ndarray) -> np.ndarray:
    """Minus the decimal logarithm of what is lacking.

    >>> to_nines(np.array([0.9, 0.99])).round(6).tolist()
    [1.0, 2.0]
    """
    lacking = np.clip(1 - np.asarray(share, dtype=float), _LEAST, None)
    nines: np.ndarray = -np.log10(lacking)
    return nines


def from_nines(nines: np.ndarray) -> np.ndarray:
    """The share of so many nines.

    >>> from_nines(np.array([1.0, 2.0])).round(6).tolist()
    [0.9, 0.99]
    """
    share: np.ndarray = 1 - np.power(10.0, -np.asarray(nines, dtype=float))
    return share


def wants_nines(shares: list[float]) -> bool:
    """Whether some shares are so near to 1, and others so far, that a plain axis would draw the former as one line.

    >>> wants_nines([0.1, 0.98]), wants_nines([0.95, 0.98]), wants_nines([0.1, 0.7])
    (True, False, False)
    """
    finite = [share for share in shares if math.isfinite(share)]
    return bool(finite) and max(finite) > 0.95 and min(finite) < 0.9
