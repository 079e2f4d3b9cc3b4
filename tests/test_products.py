"""Products in pieces: what a tensor says of a permutation, whatever order its other axes are in."""

from __future__ import annotations

import pytest
import torch

from fedrebasin.errors import SpecMismatchError
from fedrebasin.matching import numbers, products
from fedrebasin.matching.numbers import dot, norm_of
from fedrebasin.matching.plan import Term
from fedrebasin.matching.products import add_product, reorder, reordered_dot


@pytest.mark.parametrize("piece", [1, 7, 60, 10**6])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_product_in_pieces_is_the_product_of_the_reordered_tensors(
    piece: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    reference, model = (torch.randn(5, 6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    term, other = Term("w", dim, None, 1, ()), 1 - dim
    old = {other: torch.arange(reference.shape[other]), 2: torch.tensor([0, 1, 2])}
    one_differs = {**old, other: old[other][[1, 0, *range(2, len(old[other]))]]}
    all_differ = {other: old[other].flip(0), 2: torch.tensor([2, 0, 1])}
    kept = model.clone()
    for new, before in [(old, None), (one_differs, old), (all_differ, old), ({}, None)]:
        change = reorder(model, new) - (0 if before is None else reorder(model, before))
        expected = torch.ones(len(reference.movedim(dim, 0)), model.shape[dim], dtype=torch.float64)
        total = expected.clone()
        expected += term.rows(reference) @ term.rows(change).T
        add_product(total, term, reference, model, new, before)
        torch.testing.assert_close(total, expected)
    assert torch.equal(model, kept)


def test_a_tensor_of_one_axis_is_multiplied_whole() -> None:
    total = torch.zeros(2, 2)
    add_product(total, Term("b", 0, None, 1, ()), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), {}, None)
    assert total.tolist() == [[3.0, 4.0], [6.0, 8.0]]


@pytest.mark.parametrize("piece", [1, 13])
def test_sums_in_pieces_are_those_of_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 6, generator=generator) for _ in range(2))
    orders = {0: torch.tensor([3, 0, 4, 1, 2]), 1: torch.randperm(6, generator=generator)}
    monkeypatch.setattr(numbers, "_SUMMED", piece)
    monkeypatch.setattr(products, "PIECE", piece)
    expected = float((first.double() * second.double()).sum())
    assert dot(first, second) == pytest.approx(expected, rel=1e-6)
    moved = second[orders[0]][:, orders[1]]
    assert reordered_dot(first, second, orders) == pytest.approx(float((first * moved).sum()), rel=1e-5)
    assert reordered_dot(first, second, {1: orders[1]}) == pytest.approx(
        float((first * second[:, orders[1]]).sum()), rel=1e-5
    )
    assert norm_of(first, "w", "model") == pytest.approx(float(first.double().norm()))
    second[4, 5] = float("nan")
    with pytest.raises(SpecMismatchError, match="model: 'w' holds a NaN"):
        norm_of(second, "w", "model")
