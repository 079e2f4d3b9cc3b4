"""An experiment's folder takes the same run again, and refuses every other one as compare does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fedrebasin.errors import UsageError
from fedrebasin.simulations import cli, disjoint, sweep
from fedrebasin.simulations.disjoint import reproduce_disjoint
from fedrebasin.simulations.disjoint_options import DisjointOptions
from fedrebasin.simulations.results import load_results, save_results
from fedrebasin.simulations.sweep import reproduce_sweep
from fedrebasin.simulations.sweep_options import SweepOptions

TINY = DisjointOptions("digits", width=4, epochs=1, lams=3, calibration_images=50, device="cpu", corrections=())


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (disjoint, sweep):
        monkeypatch.setattr(module, "render", lambda results, folder: folder / "report.html")


def run(folder: Path, **changes: object) -> None:
    reproduce_disjoint(dataclasses.replace(TINY, output=folder, **changes), lambda line: None)


def run_sweep(folder: Path, over: str = "width", values: tuple[int, ...] = (4,), **changes: object) -> None:
    base = dataclasses.replace(TINY, output=folder, **changes)
    reproduce_sweep(SweepOptions(base, over, values), lambda line: None)


def refused(folder: Path, said: str, again: object, **changes: object) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=f"--output: expected a new or empty folder, or one of .*{said}"):
        again(folder, **changes)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_anything_else_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    save_results(tmp_path / "results.json", {"kind": "compare", "runs": []})
    for again in (run, run_sweep):
        refused(tmp_path, "is in use", again)
    (tmp_path / "results.json").rename(tmp_path / "mine.json")
    for again in (run, run_sweep):
        refused(tmp_path, "is in use", again)


def test_the_same_run_may_be_repeated_and_get_more_seeds_and_another_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, seeds=(0, 1))
    run(tmp_path, seeds=(1, 0))
    refused(tmp_path, "has width 4, this run 5", run, width=5)
    refused(tmp_path, "has width 4, this run 5", run, width=5, epochs=None, minutes=5.0)
    refused(tmp_path, "also has 0, which would be lost", run, seeds=(1,))
    refused(tmp_path, "is in use", run_sweep)


def test_a_run_that_was_killed_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "results.json").unlink()
    refused(tmp_path, "has lams 3, this run 5", run, lams=5)
    run(tmp_path, seeds=(0, 1))


def test_a_sweep_gets_more_values_and_loses_none(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    run_sweep(tmp_path, values=(5, 4))
    refused(tmp_path, "also has 5, which", run_sweep, values=(4,))
    refused(tmp_path, "has epochs 1, this run 2", run_sweep, values=(5, 4), epochs=2)
    refused(tmp_path, "is in use", run_sweep, over="epochs", values=(1,))
    refused(tmp_path, "is in use", run)


def test_only_results_of_the_experiment_and_data_set_are_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "one")
    run(tmp_path / "all", ends=("all",))
    run_sweep(tmp_path / "sweep")
    for name, results in (("compare", {"kind": "compare"}), ("empty", {})):
        save_results(tmp_path / name / "results.json", results)
    for line, said in {
        "disjoint digits compare": "expected results of reproduce disjoint; .* holds those of compare",
        "disjoint digits empty": "holds those of nothing that is known; give the results.json of such a run",
        "disjoint digits sweep": "expected results of reproduce disjoint; .* holds those of sweep",
        "disjoint mnist one": "expected results of mnist; .* holds those of digits",
        "disjoint digits all": "expected results of both ends in the first file",
        "sweep digits one": "expected results of reproduce sweep; .* holds those of disjoint",
        "sweep mnist sweep": "expected results of mnist; .* holds those of digits",
    }.items():
        experiment, name, folder = line.split()
        call = ["reproduce", experiment, name, "--redraw", str(tmp_path / folder / "results.json")]
        assert cli.run([*call, "--output", f"{tmp_path}/page"]) == 2, line
        assert re.search(f"--redraw: .*{said}", capsys.readouterr().err), line
    assert not (tmp_path / "page").exists()


def test_a_page_is_not_drawn_over_that_of_another_run(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "other", width=5)
    with pytest.raises(UsageError, match="other has width 5, this run 4"):
        disjoint.redraw(tmp_path / "one" / "results.json", tmp_path / "other")
    run_sweep(tmp_path / "sweep")
    with pytest.raises(UsageError, match="one is in use"):
        sweep.redraw(tmp_path / "sweep" / "results.json", tmp_path / "one")
    for folder, again in (("one", disjoint.redraw), ("sweep", sweep.redraw)):
        before = load_results(tmp_path / folder / "results.json")
        assert again(tmp_path / folder / "results.json", tmp_path / folder).name == "report.html"
        assert load_results(tmp_path / folder / "results.json") == before
