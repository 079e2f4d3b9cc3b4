"""Options that several commands have."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

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
    str, typer.Option(help="none; calibration: each round keeps the best model by agreement on calibration images.")
]
Seeds = Annotated[str, typer.Option(help="Numbers with commas between.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Output = Annotated[Path | None, typer.Option(help="A new folder; default: one in fedrebasin-results.")]


def command_line() -> str:
    """The command line that this process was called with."""
    return shlex.join(["fedrebasin", *sys.argv[1:]])
