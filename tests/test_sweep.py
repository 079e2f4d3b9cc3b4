"""A sweep is the disjoint experiment at several values: the same numbers, each end trained once, a true page."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from fedrebasin.errors import UsageError
from fedrebasin.simulations import ends, sweep
from fedrebasin.simulations.bench.tables import TABLES
from fedrebasin.simulations.cli import run
from fedrebasin.simulations.disjoint import reproduce_disjoint
from fedrebasin.simulations.disjoint_options import DisjointOptions
from fedrebasin.simulations.results import load_results, save_results
from fedrebasin.simulations.sweep import redraw, reproduce_sweep
from fedrebasin.simulations.sweep_numbers import barriers, wins
from fedrebasin.simulations.sweep_options import SweepOptions, parse_over
from fedrebasin.simulations.sweep_page import answer

BASE = DisjointOptions(
    "digits",
    epochs=1,
    width=16,
    seeds=(0, 1),
    lams=3,
    calibration_images=100,
    device="cpu",
    corrections=("repair",),
    command="fedrebasin again",
)


def silent(line):
    del line


def swept(folder, over, values, *, same_data=False, **changes):
    base = dataclasses.replace(BASE, output=folder, **changes)
    return reproduce_sweep(SweepOptions(base, over, values, same_data), silent)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, swept(folder, "width", (8, 16))


@pytest.fixture
def trainings(monkeypatch):
    calls = []
    real = ends.train
    monkeypatch.setattr(ends, "train", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


@pytest.fixture
def no_page(monkeypatch):
    monkeypatch.setattr(sweep, "render", lambda results, folder: folder / "report.html")


def test_a_sweep_leaves_results_pictures_and_page(finished):
    folder, page = finished
    assert page == folder / "report.html"
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.json", "report.html", "sweep.png", "barrier.png", "ends", "partial"}
    results = load_results(folder / "results.json")
    assert [(point["value"], point["seed"]) for point in results["points"]] == [(8, 0), (8, 1), (16, 0), (16, 1)]
    assert "width" not in results["config"] and results["provenance"]["seeds"] == [0, 1]
    assert page.read_text(encoding="utf-8").count("data:image/png") == 2


def test_a_point_has_the_numbers_of_the_disjoint_experiment(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("fedrebasin.simulations.disjoint.render", lambda results, folder: folder)
    reproduce_disjoint(dataclasses.replace(BASE, output=tmp_path, seeds=(1,)), silent)
    expected = load_results(tmp_path / "results.json")["seeds"][0]
    point = load_results(finished[0] / "results.json")["points"][3]
    assert point["rows"] == {name: expected["rows"][name] for name in point["rows"]}
    assert point["curves"] == {name: expected["curves"][name] for name in ("plain", "aligned")}
    assert {"aligned+repair", "a+corrected", "ensemble-logits", "all"} <= set(point["rows"])


def test_a_second_sweep_trains_and_measures_nothing_and_a_longer_one_only_what_is_new(finished, trainings, no_page):
    first = load_results(finished[0] / "results.json")
    swept(finished[0], "width", (8, 16))
    assert trainings == [] and load_results(finished[0] / "results.json")["points"] == first["points"]
    swept(finished[0], "width", (8, 16, 4))
    assert len(trainings) == 2 * 3
    save_results(finished[0] / "results.json", first)


def test_over_splits_the_model_of_all_data_is_trained_once(tmp_path, trainings, no_page):
    swept(tmp_path, "held", (0.1, 0.5), seeds=(0,))
    points = load_results(tmp_path / "results.json")["points"]
    assert len(trainings) == 2 * 2 + 1
    assert points[0]["rows"]["all"] == points[1]["rows"]["all"]
    assert points[0]["rows"]["a"] != points[1]["rows"]["a"]


def test_with_the_same_data_both_ends_see_everything_and_differ_by_their_seeds(tmp_path, monkeypatch, no_page):
    seen = []
    real = ends.train
    monkeypatch.setattr(
        ends, "train", lambda *args, **kwargs: seen.append((len(args[2]), kwargs["seed"])) or real(*args, **kwargs)
    )
    swept(tmp_path, "width", (8,), same_data=True, seeds=(0,))
    (first, seed_a), (second, seed_b) = seen
    assert first == second == 1347 and seed_a != seed_b
    results = load_results(tmp_path / "results.json")
    rows = results["points"][0]["rows"]
    assert rows["a"] != rows["b"] and "all" not in rows
    assert not any("prior" in row[0] for row in TABLES["sweep"](results)[1])
    for part in ("test", "train"):
        curve = results["points"][0]["curves"]["plain"][part]
        expected = max(curve["loss"]) - (rows["a"][part]["loss"] + rows["b"][part]["loss"]) / 2
        assert barriers(results, 8, "plain", part) == [pytest.approx(expected, abs=1e-6)]


def test_wins_are_counted_by_seed_against_the_better_end(finished):
    results = copy.deepcopy(load_results(finished[0] / "results.json"))
    for point, ours in zip([p for p in results["points"] if p["value"] == 8], (0.1, 0.9), strict=True):
        point["rows"]["a"]["test"] |= {"loss": 0.5, "top1": 0.5}
        point["rows"]["b"]["test"] |= {"loss": 0.2, "top1": 0.4}
        point["rows"]["aligned"]["test"] |= {"loss": ours, "top1": 0.6}
    assert wins(results, 8, "aligned") == (1, 2, 2)
    assert "on accuracy at width 8" in answer(results)


def test_the_table_has_a_column_for_each_value_and_every_baseline(finished):
    columns, rows = TABLES["sweep"](load_results(finished[0] / "results.json"))
    assert columns[1:] == ["width 8", "width 16"]
    labels = [row[0].strip("*") for row in rows]
    for label in (
        "plain average",
        "aligned average + REPAIR",
        "best single client",
        "loss barrier, aligned, test images",
    ):
        assert label in labels
    assert "one model trained on all data" in labels and all(len(row) == 3 for row in rows)


def test_the_page_can_be_drawn_again_from_the_results_alone(finished, tmp_path):
    save_results(tmp_path / "results.json", load_results(finished[0] / "results.json"))
    page = redraw(tmp_path / "results.json", tmp_path / "page", silent)
    assert page.read_text(encoding="utf-8") == finished[1].read_text(encoding="utf-8")


def test_the_command_draws_again_and_trains_nothing(finished, tmp_path, trainings):
    file = finished[0] / "results.json"
    assert run(f"reproduce sweep digits --redraw {file} --output {tmp_path}".split()) == 0
    assert trainings == [] and {path.name for path in tmp_path.iterdir()} == {"sweep.png", "barrier.png", "report.html"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("digits --over depth", "--over: expected one of width, epochs, held"),
        ("digits --over width:64,x", "--over: expected numbers"),
        ("digits --over width:64,64", "--over: expected each value once"),
        ("digits --over held:0.2,1.5", "--held: expected a share between 0 and 1"),
        ("digits --over held --same-data", "--same-data: expected --over width or epochs"),
        ("digits --corrections magic", "--corrections: expected some of"),
        ("nope", "data set: expected one of digits"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", "sweep", *line.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_a_tiny_sweep(tmp_path, capsys):
    line = (
        f"reproduce sweep digits --over epochs:1,2 --width 4 --lams 3 --seeds 0 --corrections none --output {tmp_path}"
    )
    assert run(line.split()) == 0
    assert "report.html" in capsys.readouterr().out
    assert load_results(tmp_path / "results.json")["values"] == [1, 2]


def test_usual_values_depend_on_the_data_set_and_the_network():
    assert parse_over("width", "digits")[1][-1] == 2048
    assert parse_over("width", "digits", "conv") == parse_over("width", "cifar10")
    with pytest.raises(UsageError, match="each value once"):
        parse_over("epochs:2,2", "digits")
