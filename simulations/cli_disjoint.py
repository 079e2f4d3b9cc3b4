"""The command ``fedrebasin reproduce disjoint``."""

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


def disjoint(
    dataset: Annotated[str, typer.Argument(help="digits, mnist, cifar10 or cifar100.")],
    model: Model = "",
    width: Width = None,
    norm: Norm = "batch",
    epochs: Epochs = None,
    minutes: Annotated[
        float | None, typer.Option(help="Instead of epochs: as many as fit into a run of this length.")
    ] = None,
    seeds: Seeds = "0",
    held: Held = 0.2,
    ends: Annotated[str, typer.Option(help="Networks to train: a,b,all; a,b; or all, a run of its own.")] = "a,b,all",
    lams: Annotated[int, typer.Option(min=3, help="Points between the two models.")] = 25,
    corrected_lams: Annotated[
        int | None, typer.Option(min=2, help="Points with corrections; default: all for the mlp and on a GPU.")
    ] = None,
    corrections: Corrections = "all",
    calibration: CalibrationImages = 5000,
    matching: Matching = "weight",
    augment: Annotated[str, typer.Option(help="shift, zoom or flip; for CIFAR.")] = "shift",
    compile_networks: Annotated[
        bool, typer.Option("--compile", help="Compile networks for training; pays on a GPU.")
    ] = False,
    redraw: Annotated[
        list[Path] | None,
        typer.Option(help="Train nothing; draw this results.json again, joined by the rows of further ones."),
    ] = None,
    data_path: DataPath = None,
    device: Device = "auto",
    precision: Precision = "auto",
    output: Output = None,
) -> None:
    """Two models of two halves of the data, and the way between them (Git Re-Basin, Section 5.4).

    Data sets: digits, mnist, cifar10, cifar100.
    """
    from fedrebasin.simulations.disjoint import redraw as draw_again
    from fedrebasin.simulations.disjoint import reproduce_disjoint
    from fedrebasin.simulations.disjoint_options import DisjointOptions, parse_corrections
    from fedrebasin.simulations.settings import parse_seeds

    if redraw:
        say_where(draw_again(redraw[0], output or redraw[0].parent, say, redraw[1:], dataset=dataset))
        return
    chosen = tuple(word.strip() for word in ends.split(","))
    folder = f"disjoint-{dataset}" + ("-all" if chosen == ("all",) else "")
    options = DisjointOptions(
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
        output=output or Path("fedrebasin-results") / folder,
        calibration_images=calibration,
        corrected_lams=corrected_lams,
        matching=matching,
        corrections=parse_corrections(corrections),
        ends=chosen,
        minutes=minutes,
        augment=augment,
        compile=compile_networks,
        command=command_line(),
    )
    say_where(reproduce_disjoint(options, say))
