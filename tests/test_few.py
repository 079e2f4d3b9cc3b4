"""Fewer examples than a correction needs are warned of, on the server's data and on that of all nodes."""

from __future__ import annotations

import warnings

import pytest
from corrections_ends import draw, random_ends
from torch import nn

from fedrebasin import merge
from fedrebasin.corrections.federated import FEDERATED, Case, correct_federated
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, correct


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def said(name: str, examples: int) -> list[str]:
    """The warnings of a correction, with so many examples in all."""
    model, parts = net(), draw(examples, 4).split(examples // 2)
    ends = random_ends(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if name in FEDERATED:
            case = Case(model, merge(ends), ends, [0.5, 0.5], parts[0])
            correct_federated(name, case, [[part] for part in parts])
        else:
            correct(name, CorrectionSetting(model, parts), merge(ends), ends)
    return [str(one.message) for one in found]


@pytest.mark.parametrize("name", [*(name for name, one in CORRECTIONS.items() if one.inputs), *FEDERATED])
def test_few_examples_are_warned_of_and_enough_are_not(name: str) -> None:
    assert [text for text in said(name, 6) if ": 6 " in text and text.endswith("; 100 and more would do")]
    assert not said(name, 100)
