"""What page and README say of a comparison in which nodes come and go, and the baselines of one seed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrebasin.simulations.alone import Alone, epochs_alone
from fedrebasin.simulations.attendance import attendance
from fedrebasin.simulations.baselines import score
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.readme import render
from fedrebasin.simulations.results import save_results
from fedrebasin.simulations.settings import Settings, resolve
from fedrebasin.simulations.silo import initial_model
from fedrebasin.simulations.summary import baseline_rows, megabytes
from fedrebasin.simulations.summary_tables import alignment_table, baseline_table, bytes_table, presence_table
from fedrebasin.simulations.summary_words import answer_of, method_of, question_of

JOINS = resolve(Settings(strategies="fedavg", rounds=3, start="joins:2"))


def client(node: int, accuracy: float) -> dict[str, Any]:
    return {
        "node": node,
        "loss": 1 - accuracy,
        "accuracy": accuracy,
        "corrected_loss": 0.5,
        "corrected_accuracy": accuracy + 0.01,
        "examples": 5,
    }


def made_up(settings: Settings) -> dict[str, Any]:
    """Results of four nodes whose models have 1,000,000 bytes and whose accuracy is a tenth of the round's number."""
    runs: list[dict[str, Any]] = []
    for seed in settings.seed_list:
        for name in settings.line_up:
            rounds: list[dict[str, Any]] = [{"round": 0, "accuracy": 0.0, "loss": 1.0}]
            for number in range(1, settings.rounds + 1):
                there = attendance(settings, 4, seed=seed, server_round=number)
                row = {"round": number, "accuracy": number / 10, "loss": 0.1, "nodes": [{"node": n} for n in there]}
                rounds.append(row | {"sent_bytes": 10**6 * len(there), "received_bytes": 10**6 * len(there)})
            runs.append({"seed": seed, "strategy": name, "rounds": rounds})
    best = {"loss": 0.1, "accuracy": 0.95}
    entry = {"clients": [client(node, 0.6 + node / 100) for node in range(4)], "ensemble": best, "all_data": best}
    if settings.start.startswith("joins"):
        entry["joins"] = client(3, 0.4)
    return {
        "settings": asdict(settings),
        "data": {"name": "digits"},
        "nodes": 4,
        "partition": [{"seed": seed, "rows_of_class": [[1, 2]] * 4} for seed in settings.seed_list],
        "runs": runs,
        "baselines": [{"seed": seed, **entry} for seed in settings.seed_list],
    }


def test_bytes_are_summed_over_rounds_and_both_ways() -> None:
    results = made_up(JOINS)
    # three nodes in round 1, four later: 6, 14 and 22 MB
    assert [megabytes(results, "fedavg", number) for number in (1, 2, 3)] == [[6.0], [14.0], [22.0]]
    table = bytes_table(results)
    assert table is not None
    assert table.rows[0] == ["FedAvg", "10.0 at 6.00", "20.0 at 14.00", "30.0 at 22.00"]


def test_results_of_versions_that_counted_no_bytes_have_no_such_table() -> None:
    results = made_up(JOINS)
    del results["runs"][0]["rounds"][2]["sent_bytes"]
    assert megabytes(results, "fedavg", 1) == [6.0]
    assert megabytes(results, "fedavg", 2) is None
    assert bytes_table(results) is None


def test_the_page_says_who_replied_where_it_was_not_everybody() -> None:
    table = presence_table(made_up(JOINS))
    assert table is not None
    assert table.rows == [["seed 0", "0 1 2", "0 1 2 3", "0 1 2 3"]]
    for start in ("apart", "common"):
        settings = resolve(Settings(rounds=2, start=start, seeds="0,1"))
        assert presence_table(made_up(settings)) is None
        table = presence_table(made_up(replace(settings, absent=0.5)))
        assert table is not None
        assert [row[0] for row in table.rows] == ["seed 0", "seed 1"]
    old = made_up(settings)
    del old["settings"]["absent"]  # as in files of earlier versions
    assert presence_table(old) is None
    assert "absent" not in question_of(old) + method_of(old)


def test_the_silo_that_joins_is_the_first_baseline_and_its_round_is_named() -> None:
    results = made_up(JOINS)
    name, accuracies, losses = baseline_rows(results)[0]
    assert (name, accuracies, losses) == ("the silo that joins, alone", [0.4], [0.6])
    assert baseline_rows(made_up(resolve(Settings(start="common"))))[0][0] == "best client alone"
    results["baselines"][0]["clients"].pop()  # it never came
    assert "ensemble of 3 clients" in [row[0] for row in baseline_rows(results)]
    assert "the last one joins in round 2 with a network that it trained alone" in question_of(results)
    assert "after round 2: FedAvg 20.0" in answer_of(results)
    assert "after round 3: FedAvg 30.0" in answer_of(results)
    assert "does not look at the model that is sent in round 2" in method_of(results)
    assert "(15 epochs)" in baseline_table(results).note
    absent = made_up(resolve(Settings(start="common", absent=0.3)))
    assert "Each is absent from a round with probability 0.3." in question_of(absent)


def test_a_baseline_in_the_readme_stands_below_the_round_whose_work_it_equals(tmp_path: Path) -> None:
    save_results(tmp_path / "made" / "results.json", made_up(JOINS))
    lines = render("<!-- table: attendance made -->\n<!-- end -->\n", tmp_path).splitlines()
    assert lines[1] == "| data, start | strategy | round 1 | round 2 | round 3 | MB sent |"
    assert lines[3] == "| digits, joins:2 | FedAvg | 10.0 | 20.0 | 30.0 | 22.0 |"
    assert "| digits, joins:2 | the silo that joins, alone (loss 0.600) |  | 40.0 |  |  |" in lines
    assert "| digits, joins:2 | trained on all data (loss 0.100) |  |  | 95.0 |  |" in lines


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def test_a_silo_alone_trains_as_long_as_a_node_in_all_rounds() -> None:
    for start, epochs in (("apart", 40), ("common", 40 + 6 * 5), ("joins:4", 7 * 5)):
        settings = Settings(start=start, absent=0.5, rounds=7, epochs=40, later_epochs=5)
        assert epochs_alone(settings, 4) == epochs


@pytest.mark.parametrize("start", ["apart", "common", "joins:2"])
def test_baselines_are_the_silos_own_ends_or_silos_trained_alone(start: str, digits: Dataset) -> None:
    settings = resolve(Settings(start=start, width=8, rounds=2, epochs=2, later_epochs=1))
    rows = [torch.arange(node, 400, 3) for node in range(3)]
    alone = Alone(settings, digits, rows, seed=1)
    before = score(alone.logits(alone.model_of_all), digits.test_labels)
    end = alone.logits(initial_model(settings, digits, seed=5))
    alone.ends = {2: end} if start != "apart" else {2: end, 0: -end}
    all_data = alone.train()
    assert all_data["loss"] < before["loss"]
    entry = alone.entry(all_data)
    assert entry["seed"] == 1
    assert entry["all_data"] == all_data
    assert ("joins" in entry) == (start == "joins:2")
    expected = score(end, digits.test_labels)
    if start == "apart":
        # node 1 never came
        assert [row["node"] for row in entry["clients"]] == [0, 2]
        assert entry["clients"][1]["accuracy"] == expected["accuracy"]
        return
    assert [row["node"] for row in entry["clients"]] == [0, 1, 2]
    if start == "joins:2":
        assert (entry["joins"]["node"], entry["joins"]["accuracy"]) == (2, expected["accuracy"])
    first = initial_model(settings, digits, seed=1, owner=0).state_dict()
    assert not torch.equal(alone.silos[0].state_dict()["1.weight"], first["1.weight"])


def test_the_page_names_the_model_that_was_kept_in_each_round() -> None:
    results = made_up(resolve(Settings(strategies="fedrebasin", seeds="0,1,2", rounds=1, start="common")))
    row = {"rebasin-moved-fraction": 0.5, "rebasin-objective-gain": 1.0, "rebasin-seconds": 1.0}
    for run in results["runs"]:
        run["rounds"][1] |= row
    table = alignment_table(results)
    assert table is not None
    assert table.columns[-1] == "Seconds"
    results["settings"] |= {"select": "clients", "correction": "federated-repair,federated-regmean"}
    for run, place in zip(results["runs"], (4, 1, 4), strict=True):
        run["rounds"][1]["rebasin-selected"] = place
    table = alignment_table(results)
    assert table is not None
    assert table.rows[0][-1] == "aligned+federated-repair 2 of 3, plain+federated-repair 1 of 3"
    assert "lowest loss on a fifth of each node's rows" in method_of(results)


@pytest.mark.parametrize(
    ("options", "says", "not_says"),
    [
        ({"strategies": "fedavg"}, ["from the one model"], ["FedProx", "Corrections used"]),
        ({"strategies": "fedprox"}, ["FedProx's mu: 0.01, its term off in round 1."], []),
        ({"strategies": "fedprox", "start": "common"}, ["FedProx's mu: 0.01."], ["its term off"]),
        ({"correction": "bias-normalisation"}, [], ["Corrections used", "corrections used"]),
        ({"correction": "federated-repair"}, ["Federated corrections used up to 1000"], ["on the server."]),
        ({"correction": "repair"}, ["Corrections used 1000 training images without labels on the server."], []),
    ],
)
def test_the_page_tells_only_what_took_part(options: dict[str, Any], says: list[str], not_says: list[str]) -> None:
    text = method_of(made_up(resolve(Settings(rounds=1, **options))))
    assert all(one in text for one in says), text
    assert not any(one in text for one in not_says), text
