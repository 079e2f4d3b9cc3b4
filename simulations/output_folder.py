"""The folder that a comparison's results go to: there whole, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from fedrebasin.errors import UsageError
from fedrebasin.simulations.settings import Settings


def free_folder(output: Path | None, settings: Settings) -> Path:
    """What was asked for, if it is new or empty, or a name with the time of day."""
    if output is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        output = Path("fedrebasin-results") / f"compare-{settings.data}-{settings.start.replace(':', '-')}-{stamp}"
    output = output.expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output: expected a new or empty folder; {output} is in use")
    return output


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that takes its place in one step at the end, or vanishes."""
    made: list[Path] = []
    try:
        for folder in reversed([folder for folder in output.parents if not folder.exists()]):
            folder.mkdir()
            made.append(folder)
        hidden = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        _remove_empty(made)
        raise UsageError(f"--output: cannot make {output} ({error.strerror}); choose another folder") from error
    try:
        yield hidden
        hidden.chmod(0o755)  # mkdtemp's folders are closed to others
        hidden.replace(output)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):  # somebody else has put something there meanwhile
            folder.rmdir()
