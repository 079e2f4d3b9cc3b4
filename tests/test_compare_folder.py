"""What a comparison leaves in its folder, whatever Flower's run did."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fedrebasin.errors import UsageError
from fedrebasin.simulations.compare import Options, check_extra, compare
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.interrupts import Interrupted
from fedrebasin.simulations.results import load_results, save_results
from fedrebasin.simulations.runtime import RunError
from fedrebasin.simulations.settings import Settings
from fedrebasin.simulations.site import Site
from fedrebasin.simulations.summary_tables import round_table
from fedrebasin.simulations.summary_words import answer_of


def fake_run(accuracy: dict[str, float], nodes: int = 2) -> dict[str, Any]:
    def rounds(value: float) -> list[dict[str, Any]]:
        row = {"round": 1, "accuracy": value, "loss": 1 - value, "replies": nodes, "failures": []}
        return [{"round": 0, "accuracy": 0.1, "loss": 2.3}, row]

    client = {"loss": 0.2, "accuracy": 0.9, "corrected_loss": 0.1, "corrected_accuracy": 0.92, "examples": 5}
    best = {"loss": 0.1, "accuracy": 0.95}
    return {
        "runs": [{"seed": 0, "strategy": name, "rounds": rounds(value)} for name, value in accuracy.items()],
        "baselines": [{"seed": 0, "clients": [client, client], "ensemble": best, "all_data": best}],
    }


@pytest.fixture
def no_flower(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Replaces Flower's runtime by a run that writes ``raw`` as its results, and then fails with ``error``."""
    state: dict[str, Any] = {"raw": None, "error": None, "sites": []}

    def run_app(app: Path, site: Site, *, run_config: dict[str, Any], **rest: object) -> None:
        state["sites"].append(site)
        site.log.write_text("what happened")
        if state["raw"] is not None:
            save_results(Path(run_config["results-file"]), state["raw"])
        if state["error"] is not None:
            raise state["error"]

    monkeypatch.setattr("fedrebasin.simulations.compare.run_app", run_app)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))  # where logs of failures stay
    return state


def test_a_whole_run_becomes_results_plots_and_a_page(no_flower: dict[str, Any], tmp_path: Path) -> None:
    no_flower["raw"] = fake_run({"fedavg": 0.4, "fedrebasin": 0.93, "fedavg@common": 0.96})
    folder = compare(Options(Settings(rounds=1), output=tmp_path / "new" / "out", command="fedrebasin compare digits"))
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy.png", "loss.png", "report.html", "results.json"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    results = load_results(folder / "results.json")
    assert results["provenance"]["command"] == "fedrebasin compare digits"
    assert results["settings"]["epochs"] == 40
    assert sum(map(sum, results["partition"][0]["rows_of_class"])) == len(load_dataset("digits").train_labels)
    assert round_table(results, "accuracy", "a", as_percent=True).rows[1] == ["FedRebasin", "10.0", "93.0"]
    assert "FedAvg 40.0, FedRebasin 93.0, FedAvg, common start 96.0" in answer_of(results)
    page = (folder / "report.html").read_text()
    assert "best client, label prior corrected" in page
    assert not no_flower["sites"][0].folder.exists()


def test_a_run_without_a_strategys_rounds_is_no_success(no_flower: dict[str, Any], tmp_path: Path) -> None:
    whole = fake_run({"fedavg": 0.4, "fedrebasin": 0.9, "fedavg@common": 0.9})
    for spoil in ("no run", "no round", "no reply", "a failure"):
        raw = fake_run({"fedavg": 0.4, "fedrebasin": 0.9, "fedavg@common": 0.9})
        if spoil == "no run":
            raw["runs"].pop()
        elif spoil == "no round":
            raw["runs"][2]["rounds"].pop()
        elif spoil == "no reply":
            raw["runs"][2]["rounds"][1]["replies"] = 1
        else:
            raw["runs"][2]["rounds"][1]["failures"] = ["it broke"]
        assert raw != whole
        no_flower["raw"] = raw
        with pytest.raises(RunError, match=r"the results lack \[\(0, 'fedavg@common'\)\]; the log is "):
            compare(Options(Settings(rounds=1), output=tmp_path / "new" / "out"))
        assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_its_log_and_nothing_else(no_flower: dict[str, Any], tmp_path: Path) -> None:
    no_flower["error"] = RunError("round 1 of fedavg, seed 0: a client failed")
    with pytest.raises(RunError, match="a client failed"):
        compare(Options(Settings(rounds=1), output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    (site,) = no_flower["sites"]
    assert [path.name for path in site.folder.iterdir()] == ["run.log"]


@pytest.mark.parametrize("error", [RunError("round 2 of fedavg: a client failed"), Interrupted(signal.SIGTERM)])
def test_seeds_that_were_finished_are_kept_when_a_run_ends_early(
    no_flower: dict[str, Any], tmp_path: Path, error: RunError | Interrupted
) -> None:
    names = {"fedavg": 0.4, "fedrebasin": 0.9, "fedavg@common": 0.9}
    whole, broken = fake_run(names), fake_run(names)
    for entry in [*broken["runs"], *broken["baselines"]]:
        entry["seed"] = 4
    broken["runs"].pop()
    no_flower["raw"] = {key: whole[key] + broken[key] for key in whole}
    no_flower["error"] = error
    said = str(error)
    out = tmp_path / "out"
    with pytest.raises(type(error)) as caught:
        compare(Options(Settings(rounds=1, seeds="0,4,2"), output=out))
    assert caught.value is error
    assert str(error) == f"{said}; finished before, and kept in {out}: seed 0"
    results = load_results(out / "results.json")
    assert (results["settings"]["seeds"], results["provenance"]["seeds"], results["unfinished"]) == ("0", [0], [4, 2])
    assert results["runs"] == whole["runs"]
    assert [part["seed"] for part in results["partition"]] == [0]
    assert "ended before it was through with seed 4, 2: left out here" in (out / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_results_are_not_written_over(no_flower: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        compare(Options(Settings(rounds=1), output=tmp_path))
    assert no_flower["sites"] == []


def test_where_processes_cannot_be_found_and_ended_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(UsageError, match=r"compare: expected Linux or macOS, .*; got Windows"):
        check_extra()
