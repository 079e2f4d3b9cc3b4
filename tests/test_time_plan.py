"""Epochs are planned from a measured pace, once, and a run that goes on keeps them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations import disjoint, time_plan
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.disjoint import reproduce_disjoint
from fedrebasin.simulations.disjoint_bench import Effort
from fedrebasin.simulations.disjoint_options import DisjointOptions
from fedrebasin.simulations.ends import EndConfig, make_model
from fedrebasin.simulations.results import load_results
from fedrebasin.simulations.time_plan import (
    SPARE,
    count_layers,
    epochs_that_fit,
    measure_pace,
    plan_once,
    work_after_training,
)

CONFIG = EndConfig("digits", "scikit-learn", 0.2, "mlp", 8, "batch", 3, 0, "a")
EFFORT = Effort(lams=5, corrected_lams=3, calibration_images=1000, curve_calibration_images=100)


def test_planned_epochs_fill_the_time_and_no_more():
    minutes, pace, images, after, spent = 10.0, 500.0, 20_000, 60.0, 15.0
    epochs = epochs_that_fit(minutes, pace, images, after, spent)
    seconds = [spent + after + n * images / pace for n in (epochs, epochs + 1)]
    assert seconds[0] <= (1 - SPARE) * 60 * minutes < seconds[1]


def test_too_little_time_is_refused_with_the_least_that_would_do():
    with pytest.raises(UsageError, match=r"--minutes: expected at least 2\.0 at 1,000 images/s.*got 1") as refused:
        epochs_that_fit(1.0, 1000.0, 50_000, 40.0, 10.0)
    least = float(str(refused.value).split("at least ")[1].split()[0])
    assert epochs_that_fit(least + 0.1, 1000.0, 50_000, 40.0, 10.0) == 1


def test_the_pace_is_images_by_seconds_without_the_warm_up(monkeypatch):
    now = iter([100.0, 102.0, 104.0, 104.0])
    monkeypatch.setattr(time_plan, "clock", lambda device: next(now))
    data = load_dataset("digits")
    pace = measure_pace(CONFIG, data, torch.arange(200), torch.device("cpu"), seconds=3.0)
    assert pace == 2 * time_plan.STEPS * 64 / 4.0, "two rounds of steps, because after the first 3 s were not over"


def test_measuring_the_pace_draws_nothing_from_the_global_generator():
    data = load_dataset("digits")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    measure_pace(CONFIG, data, torch.arange(200), torch.device("cpu"), seconds=0.0)
    assert torch.equal(torch.rand(3), expected)


def test_more_corrections_points_and_images_are_more_work():
    def work(corrections=("repair",), on_path=("repair",), **changes):
        return work_after_training(dataclasses.replace(EFFORT, **changes), 20, corrections, on_path, images=6000)

    assert work((), ()) < work() < work(("repair", "least-squares"))
    assert work() < min(work(lams=9), work(corrected_lams=9), work(calibration_images=2000))
    assert work() < work(curve_calibration_images=500)


def test_layers_with_weights_are_counted():
    assert count_layers(make_model(CONFIG, load_dataset("digits"))) == 4


def test_a_plan_is_made_once_for_the_same_facts(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return time_plan.TimePlan(1.0, len(calls), 10.0, 0.0)

    def planned(facts):
        return plan_once(tmp_path / "plan.json", facts, make, lambda line: None).epochs

    assert [planned({"ends": ("a",)}), planned({"ends": ("a",)}), planned({"ends": ("b",)})] == [1, 1, 2]


def test_a_run_of_given_minutes_trains_the_planned_epochs_and_so_does_its_second_start(tmp_path, monkeypatch):
    monkeypatch.setattr(disjoint, "render", lambda results, folder: folder / "report.html")
    paces = iter([3000.0])
    monkeypatch.setattr(disjoint, "measure_pace", lambda *arguments: next(paces))
    options = DisjointOptions(
        "digits", width=4, lams=3, calibration_images=50, device="cpu", output=tmp_path, minutes=0.6, corrections=()
    )
    lines = []
    for _ in range(2):
        reproduce_disjoint(options, lines.append)
    epochs = load_results(tmp_path / "results.json")["config"]["epochs"]
    assert epochs == load_results(tmp_path / "plan.json")["plan"]["epochs"] >= 1
    assert any(line.startswith("plan: 3,000 images/s") for line in lines)
    assert any(f"epoch {epochs}/{epochs}" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 3.0, "epochs": 2}, "--minutes: expected without --epochs"),
        ({"minutes": 0.0}, "--minutes: expected a positive number"),
    ],
)
def test_minutes_that_make_no_sense_are_refused(tmp_path, changes, message):
    options = dataclasses.replace(DisjointOptions("digits", output=tmp_path / "out", device="cpu"), **changes)
    with pytest.raises(UsageError, match=message):
        reproduce_disjoint(options, lambda line: None)
    assert not (tmp_path / "out").exists()
