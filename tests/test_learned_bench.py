"""The bench of learned alignment: its network is equivariant, and its rows are of held-out pairs from every start."""

from __future__ import annotations

import pytest
import torch

from fedrebasin.simulations.bench.learned import UnitNetwork, learn, permuted, rows_of
from fedrebasin.simulations.bench.learned_population import WIDTH, Population, digits, outputs_of, sines


@pytest.fixture(scope="module")
def population() -> Population:
    return sines(6, 0)


def test_vectors_move_with_their_units_and_the_networks_function_stays(population: Population) -> None:
    torch.manual_seed(0)
    orders = [torch.rand(6, WIDTH).argsort(1) for _ in range(2)]
    moved = permuted(population.states, *(torch.eye(WIDTH)[order] for order in orders))
    x = torch.linspace(-1, 1, 9).unsqueeze(1)
    before, after = (outputs_of(states, x, torch.sin) for states in (population.states, moved))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    model = UnitNetwork(1, 1)
    for vectors, others, order in zip(model(population.states), model(moved), orders, strict=True):
        expected = vectors.gather(1, order.unsqueeze(2).expand_as(vectors))
        torch.testing.assert_close(others, expected, rtol=1e-3, atol=1e-4)
        assert (others - vectors).norm() > 0.1 * vectors.norm()


def test_neighbours_are_trained_on_one_wave_and_differ(population: Population) -> None:
    x, y = population.test(1)
    first, second = (outputs_of(population.one(place), x, torch.sin) for place in (2, 3))
    assert float((first - y).square().mean()) < 0.1 > float((second - y).square().mean())
    assert (population.one(2)["0.weight"] - population.one(3)["0.weight"]).norm() > 0.5


def test_every_start_has_a_row_and_learning_finds_planted_order(population: Population) -> None:
    model = learn(population.states, 20, 0)
    rows = list(rows_of(population, model, [1, 2], "sine"))
    assert len(rows) == 6
    gains = {row["start"]: row["gain"] for row in rows}
    assert gains["no alignment"] == 0
    assert gains["learned start"] >= gains["learned alone"] > 0
    assert gains["default start, 10 restarts"] >= gains["default start"]


def test_classifiers_of_digits_learn() -> None:
    classifiers = digits(2, 1)
    images, labels = classifiers.test(0)
    answers = outputs_of(classifiers.states, images, torch.relu).argmax(-1)
    assert float((answers == labels).double().mean()) > 0.85
