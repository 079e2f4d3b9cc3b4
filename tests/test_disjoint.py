"""The paper's experiment, end to end at a tiny size: complete results, resumed runs, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import pytest

from fedrebasin.errors import UsageError
from fedrebasin.simulations import disjoint, ends
from fedrebasin.simulations.disjoint import redraw, reproduce_disjoint
from fedrebasin.simulations.disjoint_numbers import ROWS, headline, per_seed
from fedrebasin.simulations.disjoint_options import DisjointOptions
from fedrebasin.simulations.disjoint_page import answer
from fedrebasin.simulations.results import load_results, save_results

PICTURES = {"test-loss.png", "test-top1.png", "train-loss.png", "reliability.png", "similarity.png"}
TINY = DisjointOptions("digits", width=16, epochs=2, lams=3, seeds=(0, 1), calibration_images=100, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run that the tests of this module share; none may change it."""
    folder = tmp_path_factory.mktemp("disjoint")
    page = reproduce_disjoint(dataclasses.replace(TINY, output=folder, command="fedrebasin again"), lambda line: None)
    return folder, page


@pytest.fixture
def count_trainings(monkeypatch):
    calls = []
    real = ends.train

    def counted(*arguments, **keywords):
        calls.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(ends, "train", counted)
    return calls


@pytest.fixture
def no_page(monkeypatch):
    """Drawing takes most of a tiny run's time."""
    monkeypatch.setattr(disjoint, "render", lambda results, folder: folder / "report.html")


def test_a_run_leaves_results_plots_and_page(finished):
    folder, page = finished
    assert page == folder / "report.html"
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.json", "report.html", "ends", "partial"} | PICTURES


def test_the_results_hold_every_baseline_curve_and_fact(finished):
    results = load_results(finished[0] / "results.json")
    rows = set(ROWS) - {"plain+reset", "aligned+reset"}  # the mlp has no BatchNorm
    for seed in results["seeds"]:
        assert set(seed["rows"]) == set(seed["reliability"]) == rows
        for row in seed["rows"].values():
            for part in ("test", "train"):
                assert set(row[part]) == {"loss", "top1", "top5", "ece"}
                assert all(0 <= row[part][key] <= 1 for key in ("top1", "top5", "ece"))
                assert row[part]["top1"] <= row[part]["top5"]
        assert set(seed["curves"]) == {"plain", "aligned", "plain+repair", "aligned+repair"}
        assert all(curve["lams"] == [0, 0.5, 1] for curve in seed["curves"].values())
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
    assert results["provenance"]["command"] == "fedrebasin again"
    assert results["config"]["width"] == 16 and results["config"]["epochs"] == 2


def test_the_path_begins_and_ends_with_the_ends_and_aligning_does_not_change_them(finished):
    for seed in load_results(finished[0] / "results.json")["seeds"]:
        for curve in ("plain", "aligned"):
            losses = seed["curves"][curve]["test"]["loss"]
            assert losses[0] == pytest.approx(seed["rows"]["a"]["test"]["loss"], abs=1e-5)
            assert losses[-1] == pytest.approx(seed["rows"]["b"]["test"]["loss"], abs=1e-5)
            assert losses[1] == pytest.approx(seed["rows"][curve]["test"]["loss"], abs=1e-5)


def test_the_barrier_is_the_largest_loss_above_the_mean_of_the_ends(finished):
    for seed in load_results(finished[0] / "results.json")["seeds"]:
        for curve in seed["curves"].values():
            losses = curve["test"]["loss"]
            assert curve["test"]["loss-barrier"] == pytest.approx(max(losses) - (losses[0] + losses[-1]) / 2)
            assert curve["lams"][losses.index(min(losses))] == curve["test"]["best-lam"]


def test_alignment_makes_units_alike_and_leaves_what_the_network_computes(finished):
    for seed in load_results(finished[0] / "results.json")["seeds"]:
        aligned, plain, cka = (seed["similarity"][line] for line in ("aligned", "plain", "cka"))
        *hidden, head = plain
        assert list(aligned) == list(cka) == [*hidden, head] and len(hidden) == 3
        assert aligned[hidden[0]] > plain[hidden[0]] + 0.05  # after two epochs the later layers have little in common
        assert aligned[head] == pytest.approx(plain[head], abs=1e-5)
        assert all(0 < value <= 1 for value in cka.values())


def test_results_of_before_the_similarity_was_measured_are_drawn_without_it(finished, tmp_path):
    results = load_results(finished[0] / "results.json")
    for seed in results["seeds"]:
        del seed["similarity"]
    save_results(tmp_path / "results.json", results)
    redraw(tmp_path / "results.json", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == PICTURES - {"similarity.png"}


def test_a_temperature_changes_no_answer(finished):
    for seed in load_results(finished[0] / "results.json")["seeds"]:
        for path in ("plain", "aligned"):
            cooled = seed["rows"][f"{path}+temperature"]
            assert cooled["test"]["top1"] == seed["rows"][path]["test"]["top1"]
            assert cooled["train"]["loss"] <= seed["rows"][path]["train"]["loss"] * 1.05


def test_the_page_shows_the_numbers_of_the_results(finished):
    results = load_results(finished[0] / "results.json")
    text = finished[1].read_text(encoding="utf-8")
    assert all(label in text for name, label in ROWS.items() if name in results["seeds"][0]["rows"])
    losses = per_seed(results, headline(results), "test", "loss")
    assert f"{sum(losses) / 2:.3f} ±" in text
    assert "fedrebasin again" in text and text.count("data:image/png") == 5


def test_a_second_run_trains_and_measures_nothing(finished, no_page, count_trainings, monkeypatch):
    first = load_results(finished[0] / "results.json")
    monkeypatch.setattr(disjoint, "measure_seed", lambda *arguments, **keywords: pytest.fail("measured again"))
    lines = []
    again = dataclasses.replace(TINY, output=finished[0], command="fedrebasin again")
    reproduce_disjoint(again, lines.append)
    assert count_trainings == []
    assert [line for line in lines if "measured earlier" in line] == [
        "seed 0: measured earlier, used again",
        "seed 1: measured earlier, used again",
    ]
    assert load_results(finished[0] / "results.json")["seeds"] == first["seeds"]


def test_a_crash_after_training_costs_no_training(tmp_path, no_page, count_trainings, monkeypatch):
    options = dataclasses.replace(TINY, output=tmp_path, seeds=(0,), epochs=1)
    with monkeypatch.context() as broken:
        broken.setattr(disjoint, "measure_seed", lambda *arguments, **keywords: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reproduce_disjoint(options, lambda line: None)
    assert len(count_trainings) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"ends"}
    reproduce_disjoint(options, lambda line: None)
    assert len(count_trainings) == 3
    assert (tmp_path / "results.json").exists()


def test_another_split_is_trained_anew(tmp_path, no_page, count_trainings):
    reproduce_disjoint(dataclasses.replace(TINY, output=tmp_path / "one", seeds=(0,), epochs=1), lambda line: None)
    shutil.copytree(tmp_path / "one" / "ends", tmp_path / "other" / "ends")
    changed = dataclasses.replace(TINY, output=tmp_path / "other", seeds=(0,), epochs=1, held=0.3)
    reproduce_disjoint(changed, lambda line: None)
    assert len(count_trainings) == 5, "both ends; the model of all data has no part in the split"


def test_the_page_can_be_drawn_again_from_the_results_alone(finished, tmp_path):
    save_results(tmp_path / "results.json", load_results(finished[0] / "results.json"))
    page = redraw(tmp_path / "results.json", tmp_path / "page")
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"report.html"} | PICTURES
    assert page.read_text(encoding="utf-8").count("data:image/png") == 5


def test_without_jinja2_the_results_are_complete_and_one_line_says_what_is_missing(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    save_results(tmp_path / "results.json", load_results(finished[0] / "results.json"))
    lines = []
    assert redraw(tmp_path / "results.json", tmp_path, lines.append) == tmp_path / "results.json"
    assert len(lines) == 1 and "jinja2" in lines[0] and "complete" in lines[0]
    assert not (tmp_path / "report.html").exists()


def test_a_loss_that_is_not_finite_is_drawn_and_named(finished, tmp_path):
    results = load_results(finished[0] / "results.json")
    for seed in results["seeds"]:
        seed["rows"]["plain"]["test"]["loss"] = math.nan
        seed["curves"]["plain"]["test"]["loss"][1] = math.inf
    save_results(tmp_path / "results.json", results)
    text = redraw(tmp_path / "results.json", tmp_path).read_text(encoding="utf-8")
    assert "not finite" in text


def test_a_convolutional_network_gets_its_batch_norm_reset(tmp_path, no_page):
    options = DisjointOptions("digits", model="conv", width=4, epochs=1, lams=5, output=tmp_path, device="cpu")
    reproduce_disjoint(options, lambda line: None)
    results = load_results(tmp_path / "results.json")
    assert set(results["seeds"][0]["rows"]) == set(ROWS)
    assert headline(results) == "aligned+reset"
    assert results["seeds"][0]["curves"]["aligned+reset"]["lams"] == [0, 0.5, 1]
    assert results["config"]["corrected_lams"] == 3


def test_an_output_that_is_a_file_is_refused_before_any_training(tmp_path, count_trainings):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="--output: expected a folder that can be written"):
            reproduce_disjoint(dataclasses.replace(TINY, output=output), lambda line: None)
    assert count_trainings == [] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("loss", "top1", "opening"),
    [
        ((0.1, 0.2), (0.9, 0.8), "Yes, on loss and on accuracy"),
        ((0.4, 0.5), (0.1, 0.2), "No, neither on loss nor on accuracy"),
        ((0.1, 0.2), (0.1, 0.2), "it is better on loss and worse on accuracy"),
        ((0.2, 0.4), (0.4, 0.6), "It is level with the better of them"),
    ],
)
def test_the_answer_follows_from_the_numbers(finished, tmp_path, loss, top1, opening):
    results = load_results(finished[0] / "results.json")
    for seed, ours, share in zip(results["seeds"], loss, top1, strict=True):
        for end in ("a", "b"):
            seed["rows"][end]["test"] |= {"loss": 0.3, "top1": 0.5}
        seed["rows"][headline(results)]["test"] |= {"loss": ours, "top1": share}
    assert opening in answer(results)


def test_the_experiment_imports_neither_flower_nor_what_only_the_page_needs():
    code = """
import json, sys
import fedrebasin.simulations.disjoint
absent = ("flwr", "datasets", "sklearn", "jinja2", "matplotlib", "pandas")
print(json.dumps([name for name in absent if name in sys.modules]))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == []
