"""The parts of a comparison that need no run of Flower."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations.baselines import client_baselines, correct_prior
from fedrebasin.simulations.compare import APP, Options, compare
from fedrebasin.simulations.competitors import FLOWER, label_of, make_strategy
from fedrebasin.simulations.console import Lines
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.events import Follower, emit
from fedrebasin.simulations.handover import TENSORS, hand_over, take_over
from fedrebasin.simulations.processes import Family
from fedrebasin.simulations.results import load_results
from fedrebasin.simulations.runtime import RunError
from fedrebasin.simulations.settings import Settings, from_run_config, resolve, to_run_config
from fedrebasin.simulations.silo import initial_model, load_end, save_end, train_round
from fedrebasin.simulations.site import Site
from fedrebasin.simulations.summary import answer_of, round_table


def test_the_apps_own_config_is_the_commands_default() -> None:
    import tomllib

    project = tomllib.loads((APP / "pyproject.toml").read_text())
    config = project["tool"]["flwr"]["app"]["config"]
    assert project["project"]["dependencies"] == []
    for name in (APP.name, project["project"]["name"]):
        assert "_" not in name
        assert len(name) <= 32
    files = {"data-file", "ends-folder", "progress-file", "results-file"}
    assert {key: config[key] for key in config if key not in files} == to_run_config(Settings())
    assert files <= set(config)
    assert from_run_config(config) == resolve(Settings())


def test_settings_survive_the_way_through_a_run_config() -> None:
    settings = resolve(
        Settings(data="mnist", strategies="fedadam,rebasin:fedadam", seeds="3,1", start="common", rounds=7)
    )
    assert from_run_config(to_run_config(settings)) == settings
    assert settings.seed_list == [3, 1]
    assert settings.line_up == ["fedadam", "rebasin:fedadam"]


@pytest.mark.parametrize("name", FLOWER)
def test_every_strategy_of_flower_samples_all_nodes_and_leaves_evaluation_to_the_server(name: str) -> None:
    strategy: Any = strategy_named(name)
    assert type(strategy).__name__ == label_of(name)
    assert (strategy.min_train_nodes, strategy.min_available_nodes, strategy.fraction_evaluate) == (5, 5, 0.0)


@pytest.mark.parametrize(
    ("name", "correction", "inner"),
    [
        ("fedrebasin", None, "FedAvg"),
        ("fedrebasin+repair", "repair", "FedAvg"),
        ("rebasin:fedadam", None, "FedAdam"),
        ("rebasin:fedprox+reset-batchnorm", "reset-batchnorm", "FedProx"),
    ],
)
def test_a_rebasin_strategy_has_the_correction_that_its_name_says(
    name: str, correction: str | None, inner: str
) -> None:
    strategy: Any = strategy_named(name)
    assert strategy.correction == correction
    assert type(strategy.strategy).__name__ == inner
    assert strategy.strategy.min_train_nodes == 5


def strategy_named(name: str) -> object:
    settings = Settings(model="conv", width=4)
    data = load_dataset("digits")
    return make_strategy(
        name,
        nodes=5,
        model=lambda: initial_model(settings, data, seed=0),
        example_inputs=(data.normalise(data.train_images[:2]),),
        calibration=[data.normalise(data.train_images[:8])],
        reference="auto",
        matching="weight",
        correction="none",
        server_lr=0.1,
        proximal_mu=0.1,
        seed=0,
        device="cpu",
    )


def test_a_data_set_that_is_handed_over_is_the_same(tmp_path: Path) -> None:
    data = load_dataset("digits")
    hand_over(data, tmp_path / "data.safetensors")
    copy = take_over("digits", str(tmp_path / "data.safetensors"))
    for key in TENSORS:
        assert torch.equal(getattr(copy, key), getattr(data, key))
    assert (copy.mean, copy.std, copy.classes, copy.name) == (data.mean, data.std, data.classes, data.name)


def test_a_silo_depends_on_seed_and_owner_alone(tmp_path: Path) -> None:
    data, settings = load_dataset("digits"), Settings(model="mlp", width=8)

    def end(seed: int, owner: int) -> torch.Tensor:
        model = initial_model(settings, data, seed=seed, owner=owner)
        loss = train_round(
            model, settings, data, torch.arange(100), seed=seed, owner=owner, server_round=1, epochs=1, prox=0.0
        )
        save_end(str(tmp_path), seed, owner, model.state_dict(), loss)
        return next(model.parameters()).detach()

    assert torch.equal(end(0, 0), end(0, 0))
    assert not torch.equal(end(0, 0), end(0, 1))
    assert not torch.equal(end(0, 0), end(1, 0))
    kept = load_end(str(tmp_path), 0, 1)
    assert kept is not None
    assert torch.equal(kept[0]["1.weight"], end(0, 1))
    assert load_end(str(tmp_path), 0, 2) is None
    assert load_end("", 0, 1) is None


def test_correcting_the_label_prior_recovers_the_balanced_classifier() -> None:
    balanced = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double().log_softmax(1)
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    skewed = balanced + torch.tensor([0.7, 0.2, 0.1]).double().log()
    torch.testing.assert_close(correct_prior(skewed, labels, 3).softmax(1), balanced.softmax(1))
    assert correct_prior(skewed, torch.tensor([0, 0]), 3).isfinite().all()


def test_two_clients_that_err_apart_make_a_better_ensemble() -> None:
    target = torch.tensor([0, 1, 2])
    sure, unsure = 5.0, 1.0
    first = torch.tensor([[sure, 0, 0], [0, sure, 0], [unsure, 0, 0]])
    second = torch.tensor([[0, unsure, 0], [0, sure, 0], [0, 0, sure]])
    scores: Any = client_baselines([first, second], [target, target], target, 3)
    assert [round(client["accuracy"], 3) for client in scores["clients"]] == [0.667, 0.667]
    assert scores["ensemble"]["accuracy"] == 1.0


def test_a_follower_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    follower = Follower(path)
    assert list(follower.new()) == []
    emit(str(path), "round", round=1)
    with path.open("a") as file:
        file.write('{"event": "ro')
    assert [event["round"] for event in follower.new()] == [1]
    with path.open("a") as file:
        file.write('und", "round": 2}\n')
    assert [event["round"] for event in follower.new()] == [2]
    assert list(follower.new()) == []


def test_progress_lines_name_strategy_round_and_node(capsys: pytest.CaptureFixture[str]) -> None:
    show = Lines()
    for epoch in (1, 2, 3):
        event = {
            "event": "epoch",
            "strategy": "fedrebasin",
            "round": 2,
            "node": 4,
            "epoch": epoch,
            "epochs": 3,
            "loss": 0.5,
        }
        show(event)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # the second epoch came right after the first
    assert said[1].endswith("FedRebasin, round 2, node 4: epoch 3/3, training loss 0.500")


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
    """Replaces Flower's runtime by a run that writes ``raw`` as its results, or fails with ``error``."""
    from fedrebasin.simulations.results import save_results

    state: dict[str, Any] = {"raw": None, "error": None, "sites": []}

    def run_app(app: Path, site: Site, *, run_config: dict[str, Any], **rest: object) -> None:
        state["sites"].append(site)
        site.log.write_text("what happened")
        if state["error"] is not None:
            raise state["error"]
        save_results(Path(run_config["results-file"]), state["raw"])

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


def test_results_are_not_written_over(no_flower: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        compare(Options(Settings(rounds=1), output=tmp_path))
    assert no_flower["sites"] == []


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
child = subprocess.Popen(sleeper, start_new_session=True)      # leaves group and session
start = f"import subprocess; subprocess.Popen({sleeper!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", start])                   # its child has lost its parent as well
print("ready", flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether there is such a process; one that only waits for its parent to notice its end is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="orphans are found in Linux's process table only")
def test_a_stubborn_family_is_ended_whole_even_where_it_left_group_and_parent() -> None:
    environment = {**os.environ, "FAMILY_OF_THE_TEST": str(os.getpid())}
    leader = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        family = Family(leader.pid, f"FAMILY_OF_THE_TEST={os.getpid()}")
        deadline = time.monotonic() + 10
        while len(family.look()) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        members = family.look()
        assert len(members) == 3
        assert stranger.pid not in members
        assert family.end(patience=0.5) == []
        for pid in set(members) - {leader.pid}:
            assert not runs(pid)
        assert leader.wait(10) == -signal.SIGKILL
        assert stranger.poll() is None
    finally:
        for process in (leader, stranger):
            process.kill()
            process.wait()
