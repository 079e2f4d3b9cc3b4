"""The parts of a comparison that need no run of Flower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedrebasin.errors import UsageError
from fedrebasin.simulations.app.rebasin_compare.server_app import Arena
from fedrebasin.simulations.compare import APP
from fedrebasin.simulations.competitors import FLOWER, label_of, make_strategy
from fedrebasin.simulations.console import Lines
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.events import Follower, emit
from fedrebasin.simulations.settings import Settings, from_run_config, resolve, to_run_config
from fedrebasin.simulations.silo import initial_model, rows_of_nodes


def test_the_apps_own_config_is_the_commands_default() -> None:
    import tomllib

    project = tomllib.loads((APP / "pyproject.toml").read_text())
    config = project["tool"]["flwr"]["app"]["config"]
    assert project["project"]["dependencies"] == []
    for name in (APP.name, project["project"]["name"]):
        assert "_" not in name
        assert len(name) <= 32
    files = {"data-file", "trainings-folder", "progress-file", "results-file"}
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
        ("fedrebasin+federated-regmean", "federated-regmean", "FedAvg"),
        ("rebasin:fedavgm+federated-least-squares-prior", "federated-least-squares", "FedAvgM"),
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


def test_every_rebasin_strategy_selects_from_the_corrections_that_are_named() -> None:
    strategy: Any = strategy_named("fedrebasin", correction="repair,least-squares", select="calibration")
    assert strategy._finish.selector.names[:3] == ("plain", "plain+repair", "plain+least-squares")
    assert strategy._finish.selector.loss is None
    bare: Any = strategy_named("rebasin:fedadam", select="calibration")
    assert bare._finish.selector.corrections == ()
    with pytest.raises(UsageError, match="--select: expected one of none, calibration, clients; got 'labels'"):
        resolve(Settings(select="labels"))
    with pytest.raises(UsageError, match="--correction: several need --select calibration or clients; got"):
        resolve(Settings(correction="repair,regmean"))
    with pytest.raises(UsageError, match=r"--correction: expected one of none, repair, .*; got 'mend'"):
        resolve(Settings(correction="repair,mend", select="calibration"))


def test_clients_select_from_federated_corrections_and_the_servers() -> None:
    both: Any = strategy_named("fedrebasin", correction="federated-repair,federated-regmean", select="clients")
    assert (both.select, both.correction) == ("clients", ["federated-repair", "federated-regmean"])
    one: Any = strategy_named("fedrebasin+repair", select="clients")
    assert (one.select, one.correction) == ("clients", ["repair"])
    strategies = "fedavg,fedrebasin+federated-repair"
    assert resolve(Settings(strategies=strategies, select="clients")).select == "clients"
    with pytest.raises(UsageError, match="'federated-repair' asks the clients; give --select clients"):
        resolve(Settings(strategies=strategies, select="calibration"))
    with pytest.raises(UsageError, match="--select clients: takes federated corrections with their usual options"):
        resolve(Settings(correction="federated-repair-at-once", select="clients"))


def strategy_named(name: str, correction: str = "none", select: str = "none") -> object:
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
        correction=correction,
        select=select,
        server_lr=0.1,
        proximal_mu=0.1,
        seed=0,
        device="cpu",
    )


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


def test_the_server_corrects_by_no_row_that_nodes_measure_on() -> None:
    settings, data = resolve(Settings(select="clients", calibration=2000)), load_dataset("digits")
    arena = Arena(settings, data, {1: 0, 2: 1}, 0, "")
    _, held = rows_of_nodes(settings, data, 2, seed=0)
    used = {image.numpy().tobytes() for batch in arena.calibration() for image in batch}
    assert sum(map(len, arena.calibration())) == len(data.train_labels) - sum(map(len, held))
    measured = {data.normalise(image[None])[0].numpy().tobytes() for rows in held for image in data.train_images[rows]}
    assert not used & measured
