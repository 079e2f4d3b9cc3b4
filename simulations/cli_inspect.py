"""``fedrebasin inspect``: its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedrebasin.simulations.cli_options import command_line
from fedrebasin.simulations.commands import MOST_SEED


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
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of inputs and of the proof's random weights.")] = 0,
    zoo: Annotated[bool, typer.Option("--zoo", help="Inspect torchvision's classifiers instead of one model.")] = False,
    only: Annotated[str, typer.Option(help="With --zoo: names of models with commas between.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="With --zoo: folder of results.json; a second run goes on with it.")
    ] = None,
) -> int:
    """Show which units of a model may change places, what stays fixed and why, and prove it.

    MODEL is module:factory, a function or class that makes the model.
    """
    from fedrebasin.simulations.inspection_command import Request, inspect_request, refuse, spinner
    from fedrebasin.simulations.inspection_tables import print_inspection

    if zoo:
        from fedrebasin.simulations.inspection_zoo import ZooOptions, run_zoo
        from fedrebasin.simulations.inspection_zoo_table import print_zoo

        one = {"model": model, "--input": inputs, "--kwargs": kwargs, "--vocab": vocab, "--strict": strict}
        refuse(
            {**one, "--no-check": not check, "--html": html, "--save": save, "--force": force},
            "has no meaning with --zoo",
        )
        names = tuple(name.strip() for name in only.split(",") if name.strip())
        options = ZooOptions(only=names, seed=seed, command=command_line())
        return print_zoo(run_zoo(replace(options, output=output) if output else options))
    refuse({"--only": only, "--output": output}, "needs --zoo")
    with spinner() as on_phase:
        request = Request(
            model, inputs or (), kwargs, vocab, strict=strict, check=check, seed=seed, html=html, save=save, force=force
        )
        found = inspect_request(replace(request, command=command_line(), on_phase=on_phase))
    print_inspection(found)
    return 0
