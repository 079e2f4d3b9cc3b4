"""The bench of what might bring least squares nearer to the ensemble."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedrebasin import least_squares, merge
from fedrebasin.corrections.output_goals import goals_of
from fedrebasin.simulations.bench import goals, tables_distance
from fedrebasin.simulations.bench.clients import Clients, options_of, parser_of, train_clients
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.results import load_results

pytestmark = pytest.mark.filterwarnings("ignore:calibration")
WORDS = "digits --width 8 --epochs 2 --nodes 2,3 --seeds 0,1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("goals")
    with pytest.MonkeyPatch.context() as patch:
        words = ["x", *WORDS, "--images", "120", "--ends", str(folder / "ends"), "--output", str(folder)]
        patch.setattr(sys, "argv", words)
        goals.main()
    return folder


@pytest.fixture(scope="module")
def clients(folder: Path) -> Clients:
    given = parser_of("").parse_args([*WORDS, "--ends", str(folder / "ends"), "--output", str(folder)])
    return train_clients(load_dataset("digits"), options_of(given, [120, 600]), 2, 0)


def test_every_attempt_is_measured_and_stands_in_the_table(folder: Path) -> None:
    columns, rows = tables_distance.attempts([load_results(folder / "results.json")])
    network = "digits, mlp of width 8"
    assert columns[1:] == [f"{network}, 2 clients, 120 images", f"{network}, 3 clients, 120 images"]
    table = {row[0]: row[1:] for row in rows}
    assert table["shares by layer"][0] != table["least squares"][0] and table["shares by layer"][1] == "-"
    for seed in (0, 1):  # no two attempts are the same
        losses = [row["loss"] for row in load_results(folder / "results.json")["rows"] if row["seed"] == seed]
        assert len(set(losses)) == len(losses) == 12 + 11


def test_equal_shares_in_every_layer_are_least_squares(clients: Clients) -> None:
    images = goals._batches(clients.bench, torch.arange(300))
    merged = merge(clients.states)
    found = goals.solve(clients.bench, merged, clients.states, images, [0.5] * 4)
    wanted = least_squares(clients.bench.net, merged, clients.states, images)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = goals.solve(clients.bench, merged, clients.states, images, [0.5, 0.5, 0.5, 0.3])
    assert [name for name in wanted if not torch.equal(other[name], wanted[name])] == ["7.bias", "7.weight"]


def _shares(*shares: float) -> Callable[[list[Tensor]], Tensor]:
    return partial(goals_of, "pre-activations", shares=shares)


def test_the_last_layer_alone_is_solved_for_the_goal(clients: Clients) -> None:
    bench, images = clients.bench, goals._batches(clients.bench, torch.arange(300))
    end = clients.states[0]
    same = goals.solve_last(bench, end, [end, end], images, _shares(0.5, 0.5))
    assert all(torch.allclose(same[name], end[name], atol=1e-4) for name in end)
    other = goals.solve_last(bench, end, clients.states, images, _shares(0.0, 1.0))
    assert [name for name in end if not torch.equal(other[name], end[name])] == ["7.bias", "7.weight"]

    def gap(state: dict[str, Any]) -> float:
        logits = bench.logits(dict(state), ["calibration"])["calibration"]
        return float((logits - bench.logits(clients.states[1], ["calibration"])["calibration"]).square().mean())

    assert gap(other) < 0.8 * gap(end)


def test_the_surer_end_weighs_more() -> None:
    sure, unsure = torch.tensor([[8.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert goals.by_confidence([0.5, 0.5])([sure, sure]).equal(sure)
    found = goals.by_confidence([0.5, 0.5])([sure, unsure])
    torch.testing.assert_close(found, sure * (1 / 1.5), rtol=1e-3, atol=1e-3)


def test_calibration_images_are_chosen_by_class(clients: Clients) -> None:
    labels = clients.bench.labels["calibration"]
    own, balanced, half = goals._choices(clients.bench)
    assert own.equal(torch.arange(len(labels))) and sorted(balanced.tolist()) == own.tolist()
    assert labels[balanced[:100]].bincount(minlength=10).tolist() == [10] * 10
    assert len(half) > 200 and int(labels[half].max()) == 4
