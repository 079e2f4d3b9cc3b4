"""Measures on logits, against slow oracles and limit cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fedrebasin.errors import UsageError
from fedrebasin.simulations.measures import (
    correct_prior,
    expected_calibration_error,
    fit_temperature,
    label_prior,
    mean_of_probabilities,
    measure,
    reliability,
    top_k,
)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def labels(logits) -> torch.Tensor:
    return torch.multinomial((logits / 2).softmax(1), 1, generator=torch.Generator().manual_seed(1)).flatten()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_agrees_with_sorting_each_image_by_itself(logits, labels, k):
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(7), key=lambda index: -row[index])
        right += label in order[:k]
    assert top_k(logits, labels, k) == pytest.approx(right / 200)


def test_top_5_looks_at_each_image_alone_and_not_at_the_whole_batch():
    # every class is among the top five of some image, and yet no image has its own label there
    logits = torch.eye(10).roll(1, 0) - torch.eye(10) * 9
    logits[:, :] += torch.arange(10) * 1e-3
    labels = torch.arange(10)
    assert top_k(logits, labels, 5) == 0.0


def test_top_5_of_fewer_than_five_classes_is_always_right():
    assert measure(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))["top5"] == 1.0


def test_loss_is_the_cross_entropy(logits, labels):
    assert measure(logits, labels)["loss"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)))


def test_calibration_error_agrees_with_a_loop_over_bins(logits, labels):
    confidence, guess = logits.double().softmax(1).max(1)
    total = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            gap = (guess[inside] == labels[inside]).double().mean() - confidence[inside].mean()
            total += float(inside.double().mean() * gap.abs())
    assert expected_calibration_error(logits, labels) == pytest.approx(total, abs=1e-12)


def test_a_model_that_is_as_often_right_as_it_is_sure_has_no_calibration_error():
    logits = torch.tensor([[0.7, 0.3]]).log().repeat(10, 1)
    labels = torch.tensor([0] * 7 + [1] * 3)
    assert expected_calibration_error(logits, labels) == pytest.approx(0, abs=1e-7)


def test_a_model_that_is_always_sure_and_always_wrong_has_a_calibration_error_of_one():
    assert expected_calibration_error(torch.tensor([[99.0, 0.0]] * 4), torch.ones(4, dtype=torch.long)) == 1.0


def test_reliability_bins_hold_every_image_once(logits, labels):
    found = reliability(logits, labels, bins=10)
    assert sum(found["count"]) == 200
    assert sum(found["accuracy"]) == pytest.approx(200 * top_k(logits, labels, 1))


def test_correcting_the_prior_makes_bayes_classifier_of_skewed_labels_that_of_balanced_ones():
    prior = torch.tensor([0.9, 0.1], dtype=torch.float64)
    likelihood = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    skewed = (likelihood * prior).log()
    expected = likelihood / likelihood.sum(1, keepdim=True)
    torch.testing.assert_close(correct_prior(skewed, prior).softmax(1), expected)


def test_correcting_a_flat_prior_changes_no_probability(logits):
    flat = torch.full((7,), 1 / 7)
    torch.testing.assert_close(correct_prior(logits, flat).softmax(1), logits.softmax(1))


def test_a_class_without_an_example_counts_as_one():
    prior = label_prior(torch.tensor([0, 2, 2]), 3)
    assert prior.tolist() == [0.25, 0.25, 0.5]
    assert correct_prior(torch.zeros(2, 3), prior).isfinite().all()


def test_a_class_of_share_zero_is_named():
    with pytest.raises(UsageError, match=r"classes \[1\] have none"):
        correct_prior(torch.zeros(2, 3), torch.tensor([0.4, 0.0, 0.6]))


def test_the_ensemble_of_probabilities_is_their_mean(logits):
    other = logits.flip(0)
    expected = (logits.double().softmax(1) + other.double().softmax(1)) / 2
    torch.testing.assert_close(mean_of_probabilities([logits, other]).exp(), expected)


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_the_temperature_undoes_a_scale(scale):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5_000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    assert fit_temperature(logits * scale, labels) == pytest.approx(scale, rel=0.1)


def test_no_other_temperature_gives_a_smaller_loss(logits, labels):
    fitted = fit_temperature(logits, labels)
    best = F.cross_entropy(logits.double() / fitted, labels)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert F.cross_entropy(logits.double() / (fitted * factor), labels) > best


def test_the_temperature_stays_between_its_bounds_where_the_loss_has_no_minimum():
    always_right = torch.tensor([[1.0, 0.0]])
    assert fit_temperature(always_right, torch.tensor([0])) == pytest.approx(0.01)
    assert fit_temperature(always_right, torch.tensor([1])) == pytest.approx(100)


def test_measures_of_infinite_logits_are_not_hidden():
    assert math.isnan(measure(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))["loss"])
