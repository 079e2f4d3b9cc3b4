"""A folder has to hold the data set that was named: other images, labels and classes are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from test_data import write_parquet

from fedrebasin.errors import UsageError
from fedrebasin.simulations import cli
from fedrebasin.simulations.named_data import load_named

LABELS: list[Any] = list(range(10))


def write(folder: Path, labels: list[Any] = LABELS, shape: tuple[int, ...] = (28, 28)) -> str:
    for split in ("train", "test"):
        write_parquet(
            folder / f"{split}-0.parquet", np.zeros((len(labels), *shape), np.uint8), labels, "image", "label"
        )
    return str(folder)


def test_a_folder_of_the_named_data_set_is_loaded(tmp_path: Path) -> None:
    assert load_named("mnist", write(tmp_path)).train_labels.tolist() == LABELS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": list(range(50, 60))}, "got labels from 50 to 59"),
        ({"labels": [*range(9), -1]}, "got labels from -1 to 8"),
        ({"labels": list("abcdefghij")}, "got others .ValueError"),
        ({"labels": [float(label) for label in LABELS]}, "got labels from 0 to 9"),
        ({"labels": [0, 1, 2] * 4}, "got training images of 3 classes"),
        ({"shape": (8, 8)}, "got images of 1x8x8"),
        ({"shape": (28, 28, 3)}, "got images of 3x28x28"),
    ],
)
def test_another_data_set_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    expected = "--data: expected mnist in .*, images of 1x28x28 and all labels from 0 to 9; "
    with pytest.raises(UsageError, match=f"{expected}{said}.*; give a folder with this data set"):
        load_named("mnist", write(tmp_path, **changes))


def test_cells_that_are_no_images_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        table = pa.table({"image": [{"bytes": b"none"}], "label": [0]})
        parquet.write_table(table, tmp_path / f"{split}-0.parquet")
    with pytest.raises(UsageError, match=r"--data: expected mnist in .*; got others .UnidentifiedImageError"):
        load_named("mnist", tmp_path)


@pytest.mark.parametrize("command", ["compare mnist", "reproduce disjoint mnist", "reproduce sweep mnist"])
def test_every_command_refuses_it_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "data").mkdir()
    line = [*command.split(), "--output", f"{tmp_path}/new", "--data"]
    assert cli.run([*line, write(tmp_path / "data", labels=list(range(50, 60)))]) == 2
    assert "fedrebasin: --data: expected mnist in " in capsys.readouterr().err
    assert cli.run([word.replace("mnist", "digits") for word in [*line, f"{tmp_path}/data"]]) == 2
    assert "--data: digits come with scikit-learn and take no folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
