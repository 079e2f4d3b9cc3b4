"""What an earlier run trained or measured is used again only if config and code are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedrebasin
from fedrebasin.errors import UsageError
from fedrebasin.simulations import ends, kept
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.time_plan import plan_once

CONFIG = ends.EndConfig("digits", "scikit-learn", 0.2, "mlp", 4, "batch", 1, 0, "a")


@pytest.fixture
def trained(tmp_path):
    def train():
        data, lines = load_dataset("digits"), []
        rows = torch.arange(100)
        ends.trained_end(CONFIG, data, rows, tmp_path, device=torch.device("cpu"), progress=lines.append)
        return any("used again" in line for line in lines)

    return train


def test_an_end_is_trained_once_and_anew_after_a_change_of_the_training_code(trained, monkeypatch):
    assert [trained(), trained()] == [False, True]
    monkeypatch.setattr(ends, "training_code", lambda: "other")
    assert [trained(), trained()] == [False, True]


def test_numbers_are_measured_once_and_anew_for_another_config_or_code(tmp_path, monkeypatch):
    calls = []

    def measured(config):
        def measure():
            calls.append(1)
            return {"loss": (1.0, float("nan"))}

        return kept.measured_once(tmp_path / "one.json", config, measure, label="one", progress=lambda line: None)

    for config, expected in (({"names": ("x",)}, 1), ({"names": ("x",)}, 1), ({"names": ("y",)}, 2)):
        assert measured(config) == {"loss": [1.0, None]} and len(calls) == expected
    monkeypatch.setattr(kept, "measuring_code", lambda: "other")
    measured({"names": ("y",)})
    assert len(calls) == 3


def test_a_damaged_file_of_an_earlier_run_is_named_with_the_remedy(tmp_path):
    (tmp_path / "seed-0.json").write_text('{"config": {')
    with pytest.raises(UsageError, match=r"seed-0\.json; .*; delete the file, and the run makes it again"):
        kept.measured_once(tmp_path / "seed-0.json", {}, dict, label="one", progress=lambda line: None)
    with pytest.raises(UsageError, match="delete the file"):
        plan_once(tmp_path / "seed-0.json", {}, lambda: pytest.fail("planned"), lambda line: None)


def test_the_fingerprint_of_measured_numbers_covers_all_of_the_core_and_no_strategy(monkeypatch):
    read = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or real(path))
    kept.measuring_code()
    core = Path(fedrebasin.__file__).parent
    expected = {
        path for path in core.rglob("*.py") if path.relative_to(core).parts[0] not in ("simulations", "strategies")
    }
    assert expected <= set(read)
    parts = {"fedrebasin", "axes", "matching", "corrections", "diagnostics", "rules"}
    assert {path.parent.name for path in expected} >= parts
    assert {path.stem for path in set(read) - expected} == set(kept.MEASURING)
