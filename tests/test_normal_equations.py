"""Gram matrices, the ridge and its choice, against the plain products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corrections_ends import draw
from torch import Tensor

from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.linear_maps import columns
from fedrebasin.corrections.normal_equations import NormalEquations, gram_product
from fedrebasin.corrections.shifted_gram import unfolded_gram
from fedrebasin.corrections.solution import RIDGES, choose_ridge


@pytest.mark.parametrize(("noise", "expected"), [(0.0, RIDGES[:1]), (10.0, RIDGES[-2:])])
def test_the_ridge_is_chosen_by_what_was_held_out(noise: float, expected: tuple[float, ...]) -> None:
    true = draw(3, 40)
    inputs = [draw(40, 60, seed=seed) for seed in (1, 2)]
    targets = [true @ X + noise * draw(3, 60, seed=seed) for X, seed in zip(inputs, (3, 4), strict=True)]
    fit, check = NormalEquations(), NormalEquations()
    fit.add(inputs[0], targets[0])
    check.add(inputs[1], targets[1])
    chosen = choose_ridge(fit, check, intercept=True)
    assert chosen in expected
    D, d = fit.solve(chosen, intercept=True)
    error = (targets[1] - D @ inputs[1] - d.unsqueeze(1)).square().sum() - targets[1].square().sum()
    assert check.excess(D, d) == pytest.approx(float(error) / 60)


def test_a_gram_matrix_in_blocks_is_the_whole_product() -> None:
    X = draw(600, 20)
    torch.testing.assert_close(gram_product(X), X @ X.T)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each whole product of two taps has had."""
    seen: list[int] = []
    product = torch.mm

    def mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        seen.append(a.shape[1])
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    return seen


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation", "products"),
    [
        ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 13),
        ((8, 9), (3, 3), (1, 1), ((0, 2), (1, 0)), (1, 1), 13),
        ((17, 16), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 34),
        ((12, 8), (3, 2), (1, 2), ((2, 2), (0, 0)), (2, 1), 11),
        ((40,), (3,), (2,), ((1, 1),), (3,), 5),
        ((9, 3, 9), (2, 2, 2), (1, 1, 1), ((0, 0), (0, 0), (0, 0)), (1, 1, 1), 19),
    ],
)
def test_an_unfolded_inputs_gram_matrix_needs_fewer_products_and_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    products: int,
) -> None:
    layer = Layer("w", None, None, frozenset(), stride, padding, dilation)
    x, w = draw(2, 32, *shape), torch.zeros(1, 32, *kernel, dtype=torch.float64)
    padded = F.pad(x, [size for before_after in reversed(padding) for size in before_after])
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape)]
    places = convolve(padded, w, None, stride, 0, dilation).shape[2:]
    X = columns(layer, x, kernel)
    seen = watched(monkeypatch)
    torch.testing.assert_close(unfolded_gram(layer, X, kernel, places), X @ X.T)
    assert len(seen) == products


def test_few_channels_or_small_images_are_multiplied_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("w", None, None, frozenset(), (1, 1), ((1, 1), (1, 1)), (1, 1))
    seen = watched(monkeypatch)
    for channels, size in ((3, 8), (32, 3)):
        X = columns(layer, draw(2, channels, size, size), (3, 3))
        torch.testing.assert_close(unfolded_gram(layer, X, (3, 3), (size, size)), X @ X.T)
    assert seen == []
    linear = draw(5, 9)
    torch.testing.assert_close(unfolded_gram(Layer("w", None, None, frozenset()), linear, (), ()), linear @ linear.T)


def test_sums_over_parts_are_those_of_the_whole_and_parts_stay_as_they_are() -> None:
    X, E = draw(3, 50), draw(2, 50, seed=1)
    whole, first, second = NormalEquations(), NormalEquations(), NormalEquations()
    whole.add(X, E)
    first.add(X[:, :20], E[:, :20])
    before = first.gram.clone()
    second.add(X[:, 20:30].float(), E[:, 20:30].float())
    second.add(X[:, 30:].float(), E[:, 30:].float())
    total = first + second
    total.add(X, E)
    assert torch.equal(first.gram, before)
    for name in ("gram", "cross", "x", "e"):
        assert getattr(total, name).dtype == torch.float64
        torch.testing.assert_close(getattr(total, name), 2 * getattr(whole, name), rtol=1e-5, atol=1e-5)
    assert total.count == 100
