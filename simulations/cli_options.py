"""Options that several commands have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedrebasin.simulations.commands import running_command

DataPath = Annotated[
    str | None, typer.Option("--data", help="Folder with train-*.parquet and test-*.parquet; default: download.")
]
Model = Annotated[str, typer.Option(help="mlp, conv, vgg or resnet20; default: the data set's usual one.")]
Width = Annotated[int | None, typer.Option(min=1, help="Units or channels; default: the network's usual width.")]
Norm = Annotated[str, typer.Option(help="batch or layer.")]
Matching = Annotated[
    str,
    typer.Option(help="weight, frank-wolfe or sinkhorn; on data: activation, activation+weight or straight-through."),
]
Select = Annotated[
    str,
    typer.Option(
        help="none; each round keeps the best model, calibration: by agreement on calibration images, clients: by the "
        "loss on a fifth of each client's rows, on which no strategy trains."
    ),
]
Seeds = Annotated[str, typer.Option("--seeds", "--seed", help="Numbers with commas between.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[
    str,
    typer.Option(
        help="Of the trainings: auto (bfloat16 on a GPU, float32 on the CPU), float32, or bfloat16, faster on "
        "processors that multiply in it."
    ),
]
Corrections = Annotated[
    str,
    typer.Option(
        help="all, none, or with commas between: repair, rescale, reshift, closed-form, least-squares, "
        "least-squares-probabilities, regmean, distill, least-squares+distill; with BatchNorm also reset."
    ),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs of each training; default: the data set's.")]
Held = Annotated[float, typer.Option(help="Share of a class that goes to the other half.")]
CalibrationImages = Annotated[int, typer.Option(min=1, help="Images for corrections and for matching by data.")]
Output = Annotated[Path | None, typer.Option(help="A new folder; default: one in fedrebasin-results.")]


def command_line(output: str = "FOLDER") -> str:
    """The command line that is running, without local names; ``output`` stands for that of ``--output``."""
    return running_command("fedrebasin", {"--data": "FOLDER", "--output": output, "--redraw": "FOLDER"})


def say(line: str) -> None:
    """Tell how far a run is."""
    print(line, file=sys.stderr, flush=True)


def say_where(path: Path) -> None:
    """The last line of a run: its page, or its results where there is no page."""
    print(f"the {'page is' if path.suffix == '.html' else 'results are'} {path}")
