"""fedrebasin inspect --zoo: a row for each model, kept, gone on with, and true of the code that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inspected import run

from fedrebasin.errors import UsageError
from fedrebasin.simulations import inspection_zoo, inspection_zoo_row
from fedrebasin.simulations.results import load_results


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over two small models."""
    folder = tmp_path_factory.mktemp("zoo")
    assert run(f"--zoo --only shufflenet_v2_x0_5,squeezenet1_1 --output {folder}") == 0
    return folder


def test_the_zoo_holds_a_row_for_each_model(zoo: Path) -> None:
    results = load_results(zoo / "results.json")
    assert [row["model"] for row in results["rows"]] == ["squeezenet1_1", "shufflenet_v2_x0_5"]
    for row, parameters in zip(results["rows"], (1235496, 1366792), strict=True):
        assert row["parameters"] == parameters and row["free-share"] > 0.99
        assert row["perms"] > 20 and row["log10-order"] > 4000
        assert row["change"] < 1e-9 and row["proof"] == "passed" and row["error"] is None
        assert row["export-seconds"] > row["trace-seconds"] > 0
        assert {"input", "output"} <= set(row["fixed"]) and row["notes"] == []
    assert {"python", "torch", "torchvision"} <= set(results["provenance"]["versions"])
    assert results["provenance"]["seeds"] == [0] and results["provenance"]["seconds"] > 0
    assert list(zoo.iterdir()) == [zoo / "results.json"]


def test_a_second_run_goes_on_where_the_first_ended(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_bytes((zoo / "results.json").read_bytes())
    code = load_results(zoo / "results.json")["rows"][0]["code"]
    monkeypatch.setattr(inspection_zoo, "_code", lambda: code)
    measured = []

    def fake(name: str, seed: int) -> dict[str, Any]:
        measured.append(name)
        rows = load_results(tmp_path / "results.json")["rows"]
        if name == "mnasnet0_5":  # whatever was finished is in the file by now
            assert [row["model"] for row in rows][:2] == ["squeezenet1_1", "shufflenet_v2_x0_5"]
            return {**dict.fromkeys(rows[0]), "model": name, "seconds": 1.0, "error": "exit status -9: no memory"}
        return {**rows[0], "model": name}

    monkeypatch.setattr(inspection_zoo, "_in_a_process", fake)
    line = f"--zoo --only squeezenet1_1,mnasnet0_5,shufflenet_v2_x0_5,mnasnet0_75 --output {tmp_path}"
    assert run(line) == 1  # a model that fails is a row, not an end
    assert measured == ["mnasnet0_5", "mnasnet0_75"]
    said = capsys.readouterr()
    assert "squeezenet1_1: measured earlier, used again" in said.err
    assert "mnasnet0_5: exit status -9: no memory" in said.out
    assert "4 models, 3 traced, 3 proved" in said.out
    measured.clear()
    assert run(line) == 1
    assert measured == ["mnasnet0_5"]  # what failed is tried again
    assert run(f"--zoo --only squeezenet1_1 --output {tmp_path}") == 1
    assert measured == ["mnasnet0_5"]  # and what was not asked for stays as it is
    assert len(load_results(tmp_path / "results.json")["rows"]) == 4


def test_rows_of_other_code_are_measured_again_and_never_lost(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    old = load_results(zoo / "results.json")
    for row in old["rows"]:
        row["code"] = "older"
    path.write_text(json.dumps(old))
    before = path.read_bytes()
    assert run(f"--zoo --only squeezenet1_1 --output {tmp_path}") == 2
    assert "holds rows of other code" in capsys.readouterr().err
    assert path.read_bytes() == before
    measured = []
    monkeypatch.setattr(
        inspection_zoo, "_in_a_process", lambda name, seed: measured.append(name) or {**old["rows"][0], "model": name}
    )
    assert run(f"--zoo --only squeezenet1_1,shufflenet_v2_x0_5 --output {tmp_path}") == 0
    assert measured == ["squeezenet1_1", "shufflenet_v2_x0_5"]


def test_a_process_that_dies_is_a_row_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_zoo.sys, "executable", "/bin/false")
    row = inspection_zoo._in_a_process("resnet18", 0)
    assert row["error"] == "exit status 1: nothing on stderr"
    assert row["model"] == "resnet18" and row["perms"] is None


def test_a_model_on_the_meta_device_says_that_it_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_zoo_row, "ON_META", ("squeezenet1_1",))
    row = inspection_zoo_row.measure("squeezenet1_1", 0)
    assert row["device"] == "meta" and row["input"] == "1x3x64x64"
    assert row["proof"] == "skipped: no weights are held" and "change" not in row
    assert row["log10-order"] > 5000


def test_a_failed_proof_keeps_the_numbers_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **words: Any) -> None:
        raise UsageError("no proof today")

    monkeypatch.setattr(inspection_zoo_row, "proved", fail)
    row = inspection_zoo_row.measure("squeezenet1_1", 0)
    assert row["error"] == "UsageError: no proof today" and row["perms"] == 25


def test_the_zoo_is_every_classifier_up_to_60_million_parameters_and_four_more() -> None:
    names = inspection_zoo_row.zoo_models()
    assert len(names) == len(set(names)) == 55
    assert names[0] == "squeezenet1_1" and names[-4:] == ["vit_b_16", "vit_b_32", "vgg11", "vit_h_14"]
    assert {"regnet_x_16gf", "swin_v2_s", "maxvit_t", "inception_v3"} <= set(names)
