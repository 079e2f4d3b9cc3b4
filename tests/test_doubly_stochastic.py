"""The Sinkhorn operator against closed forms, plain scaling, finite differences and limit cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedrebasin import RebasinError
from fedrebasin.assignment import solve_assignment
from fedrebasin.matching.doubly_stochastic import sinkhorn


def logits_of(size: int, kind: str = "random", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if kind == "low rank":
        return values[:, :1] @ values[:1]
    if kind == "near a permutation":
        return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)] + 1e-3 * values
    if kind == "ties":
        return values.round()
    return values


@pytest.mark.parametrize("kind", ["random", "low rank", "near a permutation", "ties"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_rows_and_columns_sum_to_one_however_large_the_logits(size: int, spread: float, kind: str) -> None:
    found = sinkhorn(spread * logits_of(size, kind))
    assert bool((found >= 0).all())
    for dim in (-1, -2):
        assert float((found.sum(dim) - 1).abs().max()) < 1e-9


def test_two_units_have_a_closed_form() -> None:
    X = logits_of(2)
    stay = torch.sigmoid((X[0, 0] + X[1, 1] - X[0, 1] - X[1, 0]) / 2)
    expected = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    torch.testing.assert_close(sinkhorn(X), expected, rtol=0, atol=1e-9)


def test_it_is_what_plain_scaling_converges_to() -> None:
    X = 3 * logits_of(7)
    plain = X.exp()
    for _ in range(5000):
        plain = plain / plain.sum(0)
        plain = plain / plain.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn(X), plain, rtol=0, atol=1e-8)
    torch.testing.assert_close(sinkhorn(X, gradient="unrolled", iterations=5000), plain, rtol=0, atol=1e-12)


def test_adding_to_a_row_or_a_column_changes_nothing() -> None:
    X = logits_of(6)
    moved = X + 50 * logits_of(6, seed=1)[:, :1] - 50 * logits_of(6, seed=2)[:1]
    torch.testing.assert_close(sinkhorn(moved), sinkhorn(X), rtol=0, atol=1e-8)


def test_large_logits_give_the_best_assignment() -> None:
    X = logits_of(30)
    assert torch.equal(sinkhorn(1e4 * X).argmax(1), solve_assignment(X))


def test_many_matrices_are_scaled_each_by_itself_in_their_own_precision() -> None:
    X = torch.stack([torch.stack([10 * logits_of(5, seed=2 * i + j) for j in range(2)]) for i in range(3)])
    found = sinkhorn(X.float())
    assert found.dtype == torch.float32 and found.shape == (3, 2, 5, 5)
    torch.testing.assert_close(found[2, 1], sinkhorn(X[2, 1].float()), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.double(), sinkhorn(X), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 3.0, 8.0])
def test_the_implicit_gradient_is_that_of_finite_differences_and_of_long_unrolling(spread: float) -> None:
    X = (spread * logits_of(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, tolerance=1e-13), X, eps=1e-6, atol=1e-6)
    weights = logits_of(5, seed=1)
    (implicit,) = torch.autograd.grad((weights * sinkhorn(X, tolerance=1e-13)).sum(), X)
    unrolled = sinkhorn(X, gradient="unrolled", iterations=4000)
    torch.testing.assert_close(implicit, torch.autograd.grad((weights * unrolled).sum(), X)[0], rtol=0, atol=1e-7)
    assert float(implicit.sum(0).abs().max()) < 1e-9 and float(implicit.sum(1).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_the_gradient_stays_finite_at_a_permutation(kind: str) -> None:
    X = (1e4 * logits_of(20, kind)).float().requires_grad_()
    (found,) = torch.autograd.grad((logits_of(20, seed=1).float() * sinkhorn(X)).sum(), X)
    assert bool(found.isfinite().all()) and float(found.abs().max()) < 10


def test_bad_logits_and_options_are_refused() -> None:
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(RebasinError, match=r"logits: expected square matrices; got shape \("):
            sinkhorn(torch.zeros(shape))
    for value in (torch.nan, torch.inf):
        with pytest.raises(RebasinError, match="logits: expected finite entries; got a NaN or an infinity"):
            sinkhorn(torch.full((2, 2), value))
    with pytest.raises(RebasinError, match="gradient: expected one of implicit, unrolled; got 'none'"):
        sinkhorn(torch.zeros(2, 2), gradient="none")
