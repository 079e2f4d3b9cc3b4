"""The command ``fedrebasin reproduce sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrebasin.simulations.cli_options import (
    CalibrationImages,
    Corrections,
    DataPath,
    Device,
    Epochs,
    Held,
    Matching,
    Model,
    Norm,
    Output,
    Precision,
    Seeds,
    Width,
    command_line,
    say,
    say_where,
)


def sweep(
    dataset: Annotated[str, typer.Argument(help="digits, mnist, cifar10 or cifar100.")],
    over: Annotated[str, typer.Option(help="width, epochs or held; with own values as width:64,128.")] = "width",
    same_data: Annotated[bool, typer.Option("--same-data", help="Both ends train on all the data.")] = False,
    model: Model = "",
    width: Width = None,
    norm: Norm = "batch",
    epochs: Epochs = None,
    seeds: Seeds = "0,1,2",
    held: Held = 0.2,
    lams: Annotated[int, typer.Option(min=3, help="Points of the path that the barrier is read from.")] = 11,
    corrections: Corrections = "repair,least-squares",
    calibration: CalibrationImages = 5000,
    matching: Matching = "weight",
    redraw: Annotated[Path | None, typer.Option(help="Train nothing; draw this results.json again.")] = None,
    data_path: DataPath = None,
    device: Device = "auto",
    precision: Precision = "auto",
    output: Output = None,
) -> None:
    """Where does merging start to pay: the disjoint experiment over widths, epochs or splits.

    Data sets: digits, mnist, cifar10, cifar100.
    """
    from fedrebasin.simulations.disjoint_options import DisjointOptions, parse_corrections
    from fedrebasin.simulations.settings import parse_seeds
    from fedrebasin.simulations.sweep import redraw as draw_again
    from fedrebasin.simulations.sweep import reproduce_sweep
    from fedrebasin.simulations.sweep_options import SweepOptions, parse_over

    if redraw:
        say_where(draw_again(redraw, output or redraw.parent, say, dataset=dataset))
        return
    name, values = parse_over(over, dataset, model or None)
    kind = "same-data" if same_data else name
    base = DisjointOptions(
        dataset=dataset,
        path=Path(data_path) if data_path else None,
        model=model or None,
        width=width,
        norm=norm,
        epochs=epochs,
        seeds=tuple(parse_seeds(seeds)),
        held=held,
        lams=lams,
        device=device,
        precision=precision,
        output=output or Path("fedrebasin-results") / f"sweep-{dataset}-{kind}",
        calibration_images=calibration,
        matching=matching,
        corrections=parse_corrections(corrections),
        command=command_line(),
    )
    say_where(reproduce_sweep(SweepOptions(base, name, values, same_data), say))
