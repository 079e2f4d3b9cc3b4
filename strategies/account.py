"""How many noised vectors a node may have given away, over all runs on one checkpoint folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from logging import INFO, WARNING
from pathlib import Path

from flwr.common.logger import log

from fedrebasin.errors import UsageError, first_line

_FILE = "releases.json"


class Account:
    """Counts what nodes are asked for, before they are: an answer that is lost on the way was given all the same.

    Clients count too, but a resumed run finds them with nothing in their ``context.state``. A round that is killed, or
    whose folder is removed, has been asked, so that the count is written down apart from the rounds.

    Parameters
    ----------
    folder : Path, optional
        The checkpoint folder; without one nothing is written.

    Attributes
    ----------
    before : int
        The most that one node was asked for in the runs before this one.

    Raises
    ------
    UsageError
        If the folder holds a count that cannot be read.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as name:
    ...     account = Account(Path(name))
    ...     account.add([1, 2], 3)
    ...     account.add([2], 3)
    ...     account.before, Account(Path(name)).before
    (0, 6)
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.before = 0
        self._asked: Counter[int] = Counter()
        self._file = None if folder is None else folder / _FILE
        if self._file is None:
            return
        try:
            if not self._file.exists():
                return
            self.before = int(json.loads(self._file.read_text(encoding="utf-8"))["releases"])
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise UsageError(
                f"checkpoint_dir: {str(self._file)!r}, which counts what clients have given away, cannot be read "
                f"({first_line(error)}); give another folder to begin anew"
            ) from error
        log(INFO, "rebasin: %d releases have been asked for in runs before; private clients count on", self.before)

    def add(self, nodes: Iterable[int], releases: int) -> None:
        """Count one query round; without a folder nobody would read the count, and nothing is kept."""
        if self._file is None or not releases:
            return
        self._asked.update(dict.fromkeys(nodes, releases))
        most = max(self._asked.values(), default=0)
        partial = self._file.with_suffix(".partial")
        try:
            partial.write_text(json.dumps({"releases": self.before + most}), encoding="utf-8")
            partial.replace(self._file)
        except OSError as error:
            log(WARNING, "rebasin: what clients give away is not counted in %s (%s)", self._file, first_line(error))
