"""The command line that results name: what was really given, without the names of local files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: the largest seed: results hold it as every reader of JSON understands it, and torch takes what is drawn from it
MOST_SEED = 2**53


def running_command(program: str, places: Mapping[str, str], words: Sequence[str] | None = None) -> str:
    """The command line that is running, without the names of local folders; of other files the last part stays.

    Where data and results lay decides no number, and such names say more of a machine than results should.

    Parameters
    ----------
    program : str
        Stands for what runs.
    places : mapping of str to str
        Options whose values are local names, and what is shown instead.
    words : sequence of str, optional
        What follows the program; by default that of this process.

    Examples
    --------
    >>> running_command("python -m bench", {"--output": "FILE"}, ["--runs", "3", "--output=/home/me/x.json"])
    'python -m bench --runs 3 --output=FILE'
    >>> running_command("fedrebasin", {}, ["merge", "/home/me/a.pt", "--spec=/home/me/spec.json"])
    'fedrebasin merge a.pt --spec=spec.json'
    """
    shown: list[str] = []
    given = sys.argv[1:] if words is None else words
    for before, word in zip(["", *given], given, strict=False):
        name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(places.get(before) or name + equals + places.get(name if equals else "", _without_folder(value)))
    return " ".join([program, shlex.join(shown)]).strip()


def _without_folder(word: str) -> str:
    path = Path(word)
    local = path.is_absolute() or (len(path.parts) > 1 and path.exists())
    return path.name if local and path.name else word


def bench_command(module: str, places: Mapping[str, str] | None = None) -> str:
    """The running command line of a module of ``simulations/bench``; ``--output`` is always a place.

    Examples
    --------
    >>> bench_command("many").split()[:3]
    ['python', '-m', 'fedrebasin.simulations.bench.many']
    """
    return running_command(f"python -m fedrebasin.simulations.bench.{module}", {"--output": "FILE", **(places or {})})
