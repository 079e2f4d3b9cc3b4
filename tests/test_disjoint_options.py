"""Which images the ends of the paper's experiment see, and which options are refused before anything is written."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations.disjoint import reproduce_disjoint
from fedrebasin.simulations.disjoint_options import DisjointOptions
from fedrebasin.simulations.ends import disjoint_halves

TINY = DisjointOptions("digits", width=16, epochs=2, lams=3, seeds=(0, 1), calibration_images=100, device="cpu")


def test_the_halves_are_disjoint_complete_and_skewed_as_asked():
    labels = torch.arange(10).repeat(100)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    a, b = disjoint_halves(labels, 10, 0.2)
    assert sorted(torch.cat([a, b]).tolist()) == list(range(1000))
    assert (len(a), int((labels[a] < 5).sum()), int((labels[b] < 5).sum())) == (500, 100, 400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "imagenet"}, "data set: expected one of digits"),
        ({"model": "cnn"}, "--model: expected one of mlp"),
        ({"norm": "group"}, "--norm: expected one of batch, layer"),
        ({"augment": "zoom"}, "--augment: digits is not augmented; leave --augment zoom out"),
        ({"held": 1.0}, "--held: expected a share between 0 and 1"),
        ({"lams": 1}, "--lams: expected at least 2; got 1"),
        ({"epochs": 0}, "--epochs: expected at least 1; got 0"),
        ({"width": -3}, "--width: expected at least 1; got -3"),
        ({"calibration_images": 0}, "--calibration: expected at least 1"),
        ({"seeds": ()}, "--seeds: expected at least one"),
        ({"seeds": (0, -1)}, "--seeds: expected numbers from 0; got -1"),
        ({"device": "tpux"}, "--device: expected auto"),
        ({"dataset": "mnist", "path": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_written(tmp_path, changes, message):
    folder = tmp_path / "out"
    with pytest.raises(UsageError, match=message):
        reproduce_disjoint(dataclasses.replace(TINY, output=folder, **changes), lambda line: None)
    assert not folder.exists()
