"""Assignments against all permutations, and bad input."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from fedrebasin.assignment import solve_assignment


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (torch.zeros(2, 3), "expected a square matrix; got shape"),
        (torch.full((2, 2), torch.inf), "expected finite entries"),
    ],
)
def test_an_assignment_needs_a_finite_square(similarity: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_assignment(similarity)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_assignment_is_the_best_of_all(size: int) -> None:
    similarity = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    best = max(sum(float(similarity[i, p[i]]) for i in range(size)) for p in permutations(range(size)))
    assert float(similarity[torch.arange(size), solve_assignment(similarity)].sum()) == pytest.approx(best)
