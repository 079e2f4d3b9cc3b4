"""A seed is a whole number, of whatever kind, and says so where it is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedrebasin import random_perms, trace, weight_matching
from fedrebasin.errors import UsageError
from fedrebasin.seeds import generator_of

NET = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))


@pytest.mark.parametrize("seed", ["a", 1.0, None, 2**70, torch.ones(2)])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(UsageError, match="seed: expected a whole number of at most 64 bits; got"):
        generator_of(seed)  # type: ignore[arg-type]


def test_the_functions_that_take_a_seed_refuse_too() -> None:
    spec, state = trace(NET, (torch.randn(3, 2),)), NET.state_dict()
    with pytest.raises(UsageError, match=r"seed: expected .* got 'a'"):
        random_perms(spec, "a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"seed: expected .* got 1\.5"):
        weight_matching(spec, state, state, seed=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind_draw_the_same(seed: int) -> None:
    assert torch.equal(torch.rand(4, generator=generator_of(seed)), torch.rand(4, generator=generator_of(3)))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    generator_of(5)
    assert torch.equal(torch.rand(1), first)
