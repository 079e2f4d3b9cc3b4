"""``fedrebasin inspect`` as the command line asks for it: its options, its files, its terminal."""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fedrebasin.errors import UsageError
from fedrebasin.simulations.inspection import Inspection, inspect_model
from fedrebasin.simulations.inspection_factory import build, importable_here, load_factory, parse_kwargs
from fedrebasin.simulations.inspection_inputs import parse_inputs
from fedrebasin.simulations.inspection_page import write_page
from fedrebasin.simulations.results import provenance
from fedrebasin.spec import PermutationSpec
from fedrebasin.whole_file import whole_file


@dataclass(frozen=True)
class Request:
    """What the command line asks for, as texts."""

    model: str
    inputs: Sequence[str]
    kwargs: str = ""
    vocab: int | None = None
    strict: bool = False
    check: bool = True
    seed: int = 0
    html: Path | None = None
    save: Path | None = None
    force: bool = False
    command: str = "fedrebasin inspect"
    on_phase: Callable[[str], None] = field(default=lambda text: None)


def inspect_request(request: Request) -> Inspection:
    """Do what ``fedrebasin inspect`` is asked for, files included.

    Raises
    ------
    UsageError
        For a model, inputs or paths that the caller can mend.
    RebasinError
        If the model cannot be traced, or its spec fails the proof.
    """
    started = time.time()
    inputs, kwargs = parse_inputs(request.inputs), parse_kwargs(request.kwargs)
    check_target(request.html, "--html", force=request.force)
    check_target(request.save, "--save", force=request.force)
    check_apart({"--html": request.html, "--save": request.save})
    with importable_here(), quiet():
        factory = load_factory(request.model)
        found = inspect_model(
            lambda: build(factory, kwargs),
            inputs,
            name=request.model,
            vocab=request.vocab,
            strict=request.strict,
            check=request.check,
            on_meta=not request.check and not isinstance(factory, nn.Module),
            seed=request.seed,
            on_phase=request.on_phase,
        )
    if request.save is not None:
        save_spec(found.spec, request.save)
    if request.html is not None:
        write_page(request.html, found, provenance(request.command, [request.seed], started))
    return found


def save_spec(spec: PermutationSpec, path: Path) -> None:
    """Save a spec, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        spec.save(file)


def check_target(path: Path | None, option: str, *, force: bool) -> None:
    """Find out before the work that a file cannot be written, or is there already."""
    if path is None:
        return
    wrong = f"{option}: expected the path of a file that can be written; got {path}"
    if path.is_dir():
        raise UsageError(wrong)
    try:
        with tempfile.TemporaryFile(dir=next(parent for parent in path.absolute().parents if parent.exists())):
            pass  # rights alone do not tell: nothing can be written in /proc
    except OSError as error:
        raise UsageError(wrong) from error
    if path.exists() and not force:
        raise UsageError(f"{option}: {path} is there already; give another path, or --force")


def check_apart(targets: Mapping[str, Path | None]) -> None:
    """Refuse one path for two files."""
    (one, first), (other, second) = targets.items()
    if first is not None and second is not None and first.absolute() == second.absolute():
        raise UsageError(f"{one}: expected another path than that of {other}; got {first} for both")


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing but this command speaks: a failed export prints graphs and stack traces besides its error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Raise ``UsageError`` for the first option that is given and has no meaning here."""
    odd = next((option for option, value in given.items() if value), None)
    if odd is not None:
        raise UsageError(f"{odd}: {why}")


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """Say what is being done, on stderr, while it lasts; nothing where stderr is no terminal."""
    console = Console(file=sys.stderr)  # the stream of now, whatever is redirected meanwhile
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)
