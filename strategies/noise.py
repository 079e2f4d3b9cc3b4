"""Noise that may have gone out is never drawn again: what a checkpoint folder says of it.

Two aggregates of one round with the same noise differ by what the clients sent, to the last bit. So ``noise.json``
names the round after which nothing has been drawn that left the server; it is removed before anything else does, and a
run that does not find it, or another round in it, draws noise that no other run has drawn.
"""

from __future__ import annotations

import json
from contextlib import suppress
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.common.logger import log

from fedrebasin.errors import first_line
from fedrebasin.whole_file import whole_file

_FILE = "noise.json"


def keep_noise(folder: Path, number: int | None) -> None:
    """Say that all noise up to a round's is in its checkpoint; with None that some may not be.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as name:
    ...     keep_noise(Path(name), 3)
    ...     first, other = is_kept(Path(name), 3), is_kept(Path(name), 2)
    ...     keep_noise(Path(name), None)
    ...     first, other, is_kept(Path(name), 3)
    (True, False, False)
    """
    file = folder / _FILE
    if number is not None:
        with suppress(OSError), whole_file(file) as beside:
            beside.write_text(json.dumps({"round": number}), encoding="utf-8")
            return
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log(WARNING, "rebasin: %s cannot be removed (%s); remove it before a resumed run", file, first_line(error))


def is_kept(folder: Path, number: int) -> bool:
    """Whether all noise that has left the server is in that round's checkpoint."""
    try:
        return bool(json.loads((folder / _FILE).read_text(encoding="utf-8"))["round"] == number)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def draw_anew(folder: Path, number: int) -> None:
    """Seed NumPy's global generator, which Flower's noise comes from, by the system."""
    np.random.seed()
    log(
        WARNING,
        "rebasin: a model after round %d of %s may have gone out already: its noise is drawn anew, and a privacy "
        "accountant does not count what went out",
        *(number, folder),
    )
