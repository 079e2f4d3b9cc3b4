"""The command ``fedrebasin``. What is heavy, but for torch, is imported where it is used."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import Annotated

import click
import typer

from fedrebasin.simulations.cli_compare import compare
from fedrebasin.simulations.cli_disjoint import disjoint
from fedrebasin.simulations.cli_inspect import inspect
from fedrebasin.simulations.cli_merge import merge
from fedrebasin.simulations.cli_sweep import sweep

app = typer.Typer(
    name="fedrebasin",
    help="Merge models that were trained apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(help="Repeat a published experiment.", no_args_is_help=True)
app.add_typer(reproduce, name="reproduce")
app.command()(inspect)
app.command()(merge)
app.command()(compare)
reproduce.command()(disjoint)
reproduce.command()(sweep)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fedrebasin {metadata.version('fedrebasin')}")
        raise typer.Exit


@app.callback()
def _fedrebasin(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    """Merge models that were trained apart."""


@reproduce.callback()
def _reproduce() -> None:
    """Repeat a published experiment."""


def main() -> None:
    """Run the command; whatever the user can mend is one line on stderr and exit status 2."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command with ``arguments`` and return its exit status."""
    try:
        status = typer.main.get_command(app).main(args=arguments, prog_name="fedrebasin", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        # typer and click may both add a suggestion
        return _complain(re.sub(r"( Did you mean [^?]*\?)\1", r"\1", error.format_message()), 2)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fedrebasin"):
            raise
        return _complain(f'missing: {error.name}; pip install "fedrebasin[simulation]"', 2)
    except BaseException as error:
        status = _status_of(error)
        if status is None:
            raise
        return _complain(str(error), status)
    return status if isinstance(status, int) else 0


def _status_of(error: BaseException) -> int | None:
    from fedrebasin.errors import RebasinError

    if isinstance(error, RebasinError):
        return 2
    from fedrebasin.simulations.interrupts import Interrupted
    from fedrebasin.simulations.runtime import RunError

    if isinstance(error, RunError):
        return 1
    return error.status if isinstance(error, Interrupted) else None


def _complain(message: str, status: int) -> int:
    line = " ".join(message.split())
    print(f"fedrebasin: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
