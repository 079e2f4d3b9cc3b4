"""Files that are written beside their place and moved there: a reader never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; what was written takes the place of ``path`` at the end.

    If the block raises, ``path`` stays as it was and what was written is gone. Each process has its own.

    Raises
    ------
    OSError
        If the file cannot be moved.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder, "facts.json")) as file:
    ...         file.write_text("{}")
    ...     [one.name for one in Path(folder).iterdir()]
    2
    ['facts.json']
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):  # it has been moved, or could not be made: its folder may be a file
            beside.unlink()
