"""``fedrebasin merge``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrebasin.simulations.cli_options import command_line
from fedrebasin.simulations.commands import MOST_SEED


def merge(
    files: Annotated[list[Path], typer.Argument(help="Two safetensors files or more, of one architecture.")],
    model: Annotated[str, typer.Option(help="module:Class or module:function that makes the model.")] = "",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of an input, as fedrebasin inspect takes it; once for each input."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The merged safetensors file.")] = None,
    kwargs: Annotated[str, typer.Option(help="The model's arguments as a JSON object.")] = "",
    vocab: Annotated[int | None, typer.Option(min=1, help="Integers of an input are drawn below this.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="A spec of fedrebasin inspect --save instead of --model, without corrections.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Prove the spec on random weights; refuse an unproved one.")] = True,
    coefficients: Annotated[str, typer.Option(help="Averaging weights with commas between; default: equal.")] = "",
    matching: Annotated[
        str,
        typer.Option(
            help="weight, frank-wolfe or sinkhorn; on --calibration: activation, activation+weight or straight-through."
        ),
    ] = "weight",
    reference: Annotated[
        Path | None, typer.Option(help="The file whose order of units the others take; default: the heaviest.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How three models or more are aligned to each other, as in match_many; straight-through-many learns "
            "from --calibration with labels."
        ),
    ] = "",
    correction: Annotated[
        str, typer.Option(help="none, or a correction on --calibration: least-squares, repair, reset-batchnorm, ...")
    ] = "none",
    calibration: Annotated[
        Path | None, typer.Option(help=".npy, .npz, a Parquet file or folder, or a folder of images; labels optional.")
    ] = None,
    examples: Annotated[int, typer.Option(min=2, help="At most so many calibration examples.")] = 1000,
    mean: Annotated[str, typer.Option(help="Subtracted from the channels of 8-bit images, in units of 255.")] = "",
    std: Annotated[str, typer.Option(help="By which the channels are divided then.")] = "",
    memory: Annotated[
        str, typer.Option(help="A limit such as 2GB; models that do not fit are read tensor by tensor.")
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(help="A PNG of how alike units respond to --calibration, before and after.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Match and report; write no output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
) -> int:
    """Merge safetensors files of networks that were trained apart into one."""
    from fedrebasin.simulations.inspection_command import spinner
    from fedrebasin.simulations.merge_command import merge_files
    from fedrebasin.simulations.merge_request import Request
    from fedrebasin.simulations.merge_tables import print_merged

    with spinner() as on_phase:
        request = Request(
            files=files,
            output=output,
            model=model,
            inputs=inputs or (),
            kwargs=kwargs,
            vocab=vocab,
            spec=spec,
            check=check,
            coefficients=coefficients,
            matching=matching,
            method=method,
            reference=reference,
            correction=correction,
            calibration=calibration,
            examples=examples,
            mean=mean,
            std=std,
            memory=memory,
            plot=plot,
            dry_run=dry_run,
            force=force,
            seed=seed,
            command=command_line("FILE"),
            on_phase=on_phase,
        )
        merged = merge_files(request)
    print_merged(merged, request)
    return 0
