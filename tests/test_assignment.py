"""Assignments against all permutations, and bad input."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
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


def made_similarity(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    """Unrelated units, units that all resemble a few, copies with noise, or few values and so many ties."""
    generator = torch.Generator().manual_seed(size)
    rows, other = (torch.randn(size, 20, generator=generator, dtype=dtype) for _ in range(2))
    if kind == "unrelated":
        return torch.randn(size, size, generator=generator, dtype=dtype)
    if kind == "hubs":
        return 100 * rows.abs() @ other.abs().T
    if kind == "copies":
        return rows @ (rows[torch.randperm(size, generator=generator)] + 0.5 * other).T
    return torch.randint(0, 3, (size, size), generator=generator).to(dtype)


@pytest.mark.parametrize("kind", ["unrelated", "hubs", "copies", "ties"])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_assignment_of_many_units_is_as_good_as_the_solver_s_on_the_similarity(
    kind: str, size: int, dtype: torch.dtype
) -> None:
    similarity = made_similarity(kind, size, dtype)
    before = similarity.clone()
    perm = solve_assignment(similarity)
    _, columns = linear_sum_assignment(similarity.double().numpy(), maximize=True)
    assert torch.equal(perm.sort().values, torch.arange(size)) and torch.equal(similarity, before)
    total, expected = (similarity.double()[torch.arange(size), order].sum() for order in (perm, columns))
    assert float(total) == pytest.approx(float(expected), rel=1e-12)
