"""The command ``fedrebasin``. What is heavy, but for torch, is imported where it is used."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import click
import typer

from fedrebasin.simulations.cli_compare import compare
from fedrebasin.simulations.cli_disjoint import disjoint
from fedrebasin.simulations.cli_options import command_line
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


app.command()(compare)
reproduce.command()(disjoint)
reproduce.command()(sweep)


@reproduce.callback()
def _reproduce() -> None:
    """Repeat a published experiment."""


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="module:factory, a function or class that makes the model.")] = "",
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Shape of an input, 1x3x32x32 (float32), 1x16:int64, or KEYWORD=SHAPE; once for each input.",
        ),
    ] = None,
    kwargs: Annotated[str, typer.Option(help="The factory's arguments as a JSON object.")] = "",
    vocab: Annotated[
        int | None, typer.Option(min=1, help="Integers are drawn below this; default: rows of the smallest embedding.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse an op that no rule covers.")] = False,
    check: Annotated[bool, typer.Option(help="Prove the spec on random weights.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write a page with a picture of the tied layers.")] = None,
    save: Annotated[Path | None, typer.Option("--save", "--json", help="Write the spec as JSON.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of inputs and of the proof's random weights.")] = 0,
    zoo: Annotated[bool, typer.Option("--zoo", help="Inspect torchvision's classifiers instead of one model.")] = False,
    only: Annotated[str, typer.Option(help="With --zoo: names of models with commas between.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="With --zoo: folder of results.json; a second run goes on with it.")
    ] = None,
) -> int:
    """Show which units of a model may change places, what stays fixed and why, and prove it."""
    from fedrebasin.simulations.inspection_command import Request, inspect_request, refuse, spinner
    from fedrebasin.simulations.inspection_tables import print_inspection

    if zoo:
        from fedrebasin.simulations.inspection_zoo import ZooOptions, run_zoo
        from fedrebasin.simulations.inspection_zoo_table import print_zoo

        one = {"model": model, "--input": inputs, "--kwargs": kwargs, "--vocab": vocab, "--strict": strict}
        refuse({**one, "--no-check": not check, "--html": html, "--save": save}, "has no meaning with --zoo")
        names = tuple(name.strip() for name in only.split(",") if name.strip())
        options = ZooOptions(only=names, seed=seed, command=command_line())
        return print_zoo(run_zoo(replace(options, output=output) if output else options))
    refuse({"--only": only, "--output": output}, "needs --zoo")
    with spinner() as on_phase:
        request = Request(
            model, inputs or (), kwargs, vocab, strict=strict, check=check, seed=seed, html=html, save=save
        )
        found = inspect_request(replace(request, command=command_line(), on_phase=on_phase))
    print_inspection(found)
    return 0


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
        return _complain(error.format_message(), 2)
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
