"""Folders that results go to: a comparison's is there whole or not at all, another experiment's goes on."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fedrebasin.errors import UsageError
from fedrebasin.simulations.kept import load_kept
from fedrebasin.simulations.settings import Settings

#: what a run that was killed leaves
_UNFINISHED = {"ends", "partial", "plan.json"}


def free_folder(output: Path | None, settings: Settings) -> Path:
    """What was asked for, if it is new or empty, or a name with the time of day."""
    if output is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        output = Path("fedrebasin-results") / f"compare-{settings.data}-{settings.start.replace(':', '-')}-{stamp}"
    output = output.expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output: expected a new or empty folder; {output} is in use")
    return output


def check_same_run(
    folder: Path,
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    seeds: Collection[int],
    values: Collection[float] = (),
) -> None:
    """Refuse a folder that is in use, but by the same run, which may have fewer seeds or values.

    Parameters
    ----------
    facts : mapping
        Entries that its ``results.json`` has to have.
    config : mapping
        Entries that its ``config``, and that of each finished part, has to have.

    Raises
    ------
    UsageError
        With the first difference.
    """
    if not folder.is_dir():
        return
    expected = "--output: expected a new or empty folder, or one of a run with the same settings"
    finished = folder / "results.json"
    earlier = load_kept(finished) if finished.exists() else {}
    strange = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - _UNFINISHED
    if any(earlier.get(key) != value for key, value in facts.items()) if earlier else strange:
        raise UsageError(f"{expected}; {folder} is in use")
    ours = json.loads(json.dumps(config))
    for part in [earlier] if earlier else map(load_kept, sorted((folder / "partial").glob("*.json"))):
        theirs = part.get("config", {})
        odd = next((key for key in ours if theirs.get(key) != ours[key]), None)
        if odd is not None:
            raise UsageError(f"{expected}; {folder} has {odd} {theirs.get(odd)}, this run {ours[odd]}")
    if earlier:
        more = {*earlier["provenance"]["seeds"]} - {*seeds} or {*earlier.get("values", ())} - {*values}
        if more:
            raise UsageError(f"{expected}; {folder} also has {', '.join(map(str, sorted(more)))}, which would be lost")


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
