"""Result files: whole or absent, and with all that is needed to make them again."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations import results as results_module
from fedrebasin.simulations.commands import running_command
from fedrebasin.simulations.results import load_results, provenance, save_results, summarise


def test_what_was_saved_is_loaded_again(tmp_path):
    saved = {"name": "Größe", "numbers": [1, 2.5, True, None], "nested": {"0": {"loss": 0.125}}}
    save_results(tmp_path / "deep" / "results.json", saved)
    assert load_results(tmp_path / "deep" / "results.json") == saved


def test_nan_and_infinities_become_null_because_json_has_none(tmp_path):
    save_results(tmp_path / "r.json", {"loss": math.nan, "list": [math.inf, -math.inf, 1.0]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"loss": None, "list": [None, None, 1.0]}


def test_tensors_arrays_and_paths_are_written_as_plain_json(tmp_path):
    save_results(
        tmp_path / "r.json",
        {"t": torch.tensor([1.5, math.nan]), "a": np.arange(2), "s": np.float32(0.5), "p": tmp_path, "u": (1, 2)},
    )
    assert load_results(tmp_path / "r.json") == {
        "t": [1.5, None],
        "a": [0, 1],
        "s": 0.5,
        "p": str(tmp_path),
        "u": [1, 2],
    }


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "r.json"
    save_results(path, {"run": 1})
    with pytest.raises(TypeError):
        save_results(path, {"run": object()})
    assert load_results(path) == {"run": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_an_interrupted_write_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    save_results(path, {"run": 1})

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_results(path, {"run": 2})
    monkeypatch.undo()
    assert load_results(path) == {"run": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(("text", "message"), [("[1]", "got list"), ("{", "expected a JSON object")])
def test_a_file_that_is_no_results_file_is_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_results(tmp_path / "r.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none\.json"):
        load_results(tmp_path / "none.json")


def test_provenance_says_what_is_needed_to_run_again():
    facts = provenance("fedrebasin compare", [0, 1], time.time() - 3)
    assert facts["command"] == "fedrebasin compare"
    assert facts["seeds"] == [0, 1]
    assert 3 <= facts["seconds"] < 60
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0] or "torch" in facts["versions"]
    assert facts["hardware"]["cores"] >= 1
    json.dumps(facts, allow_nan=False)


def test_the_commit_is_unknown_outside_a_git_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "__file__", str(tmp_path / "results.py"))
    facts = provenance("", [], time.time())
    assert (facts["commit"], facts["dirty"]) == ("unknown", None)


def test_a_summary_leaves_out_what_is_not_finite_and_says_how_many_are_left():
    assert summarise([1.0, None, 2.0, math.nan, math.inf]) == (1.5, pytest.approx(math.sqrt(0.5)), 2)
    assert summarise([4.0]) == (4.0, 0.0, 1)
    mean, deviation, n = summarise([None])
    assert math.isnan(mean) and math.isnan(deviation) and n == 0


def test_every_benchmark_names_the_command_that_really_ran():
    folder = Path(results_module.__file__).parent / "bench"
    writers = {path.stem: text for path in folder.glob("*.py") if "provenance(" in (text := path.read_text())}
    assert len(writers) > 10
    for name, text in writers.items():
        whose = "module" if name == "clients" else f'"{name}"'
        assert f"bench_command({whose}" in text, name


def test_a_command_shows_options_as_given_and_no_local_name():
    words = ["--data", "/home/me/c10", "--runs=3", "--output=/tmp/x.json", "--only", "a b"]
    found = running_command("bench", {"--data": "FOLDER", "--output": "FILE"}, words)
    assert found == "bench --data FOLDER --runs=3 --output=FILE --only 'a b'"


def test_a_command_shows_of_files_the_last_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "b.pt").touch()
    words = [
        "merge",
        "/home/me/a.pt",
        "mine/b.pt",
        "--spec=/home/me/s.json",
        "--input",
        "x=2/5",
        "--coefficients=1/2,1",
    ]
    found = running_command("fedrebasin", {}, words)
    assert found == "fedrebasin merge a.pt b.pt --spec=s.json --input x=2/5 --coefficients=1/2,1"
