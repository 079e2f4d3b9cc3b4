"""A run's progress as JSON lines in one file: written by server and clients, followed by the command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def emit(path: str, event: str, **values: object) -> None:
    """Append one line to the file at ``path``; an empty path means that nobody follows.

    One write of a file opened for appending: lines of several processes do not mix.

    Examples
    --------
    >>> emit("", "round", round=1)
    """
    if not path:
        return
    line = json.dumps({"event": event, **values}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class Follower:
    """Reads the lines that were added to a file since the last look.

    Examples
    --------
    >>> list(Follower(Path("no/such/file")).new())
    []
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def new(self) -> Iterator[Event]:
        """Yield each whole new line, decoded; a line still being written waits for the next call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)
