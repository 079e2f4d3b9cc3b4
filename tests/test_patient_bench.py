"""The bench of distillation on images that are augmented anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fedrebasin.simulations.bench import patient, tables_distance
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.results import load_results

WORDS = "digits --width 8 --epochs 2 --nodes 2 --images 120 --passes 2".split()


def measured(folder: Path, seeds: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        words = ["--seeds", seeds, "--ends", str(folder / "ends"), "--output", str(folder / seeds)]
        patch.setattr(sys, "argv", ["x", *WORDS, *words])
        patient.main()
    return folder / seeds / "results.json"


def test_every_attempt_is_measured_and_runs_of_other_seeds_share_a_column(tmp_path: Path) -> None:
    files = [load_results(measured(tmp_path, seeds)) for seeds in ("0", "1")]
    assert files[0]["config"]["passes"] == 2
    losses = [row["loss"] for one in files for row in one["rows"]]
    assert len(set(losses)) == len(losses) == 2 * 5
    columns, rows = tables_distance.attempts(files)
    assert columns[1:] == ["digits, mlp of width 8, 2 clients, 120 images"]
    table = {row[0]: row[1] for row in rows}
    assert len(table) == 5 + 2
    assert all("±" in cell for cell in table.values())


def test_images_are_drawn_and_augmented_anew_each_time_in_whole_batches() -> None:
    data = load_dataset("digits")
    anew = patient.Anew(data, data.train_images[:250], 0)
    first, second = list(anew), list(anew)
    assert [len(batch) for batch in first] == [100, 100]
    assert not torch.equal(first[0], second[0])
    again = list(patient.Anew(data, data.train_images[:250], 0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
