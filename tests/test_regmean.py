"""regmean: the closed formula, Grams that are handed in, and what it leaves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corrections_ends import check_keeps_form, draw, random_ends, run
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, input_grams, merge, regmean
from fedrebasin.simulations.models import build_model

SHARES = [0.5, 0.2, 0.3]


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_it_is_the_papers_formula_with_the_coefficients(off_diagonal: float) -> None:
    net, data = deep(), [draw(70, 4), draw(30, 4, seed=1)]
    ends = random_ends(net, count=3)
    found = regmean(net, merge(ends, coefficients=SHARES), ends, data, coefficients=SHARES, off_diagonal=off_diagonal)
    left = right = torch.zeros(())
    for share, end in zip(SHARES, ends, strict=True):
        h = with_ones(torch.tanh(F.linear(torch.cat(data), end["0.weight"], end["0.bias"])))
        G = share * h.T @ h / len(h)
        G = torch.where(torch.eye(7, dtype=torch.bool), G, off_diagonal * G)
        left = left + G @ torch.cat([end["2.weight"], end["2.bias"].unsqueeze(1)], 1).T
        right = right + G
    W = torch.linalg.solve(right, left)
    torch.testing.assert_close(found["2.weight"], W[:-1].T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found["2.bias"], W[-1], rtol=1e-8, atol=1e-10)


def test_the_clients_own_grams_may_be_handed_in() -> None:
    net, data = deep(), [draw(80, 4), draw(40, 4, seed=1)]
    ends = random_ends(net)
    grams = [input_grams(net, end, [own]) for end, own in zip(ends, data, strict=True)]
    assert [float(gram["0.weight"][-1, -1]) for gram in grams] == [80, 40]
    found = regmean(net, merge(ends), ends, [data[0][:1]], coefficients=[80, 40], grams=grams, off_diagonal=1.0)
    left = right = torch.zeros(())
    for end, own in zip(ends, data, strict=True):
        x = with_ones(own)
        left = left + x.T @ x @ torch.cat([end["0.weight"], end["0.bias"].unsqueeze(1)], 1).T  # sums, as in the paper
        right = right + x.T @ x
    torch.testing.assert_close(found["0.weight"], torch.linalg.solve(right, left)[:-1].T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_an_end_merged_with_itself_keeps_its_function(norm: str) -> None:
    net, images = build_model("conv", (3, 8, 8), 3, width=6, norm=norm).double(), [draw(40, 3, 8, 8)]
    (end,) = random_ends(net, images, count=1, noise=0.1)
    found = regmean(net, end, [end, end], images, coefficients=[0.3, 0.7])
    torch.testing.assert_close(run(net, found, images[0]), run(net, end, images[0]), rtol=1e-6, atol=1e-6)


def test_keys_order_and_dtypes_stay_and_inputs_are_not_edited() -> None:
    net, images = build_model("conv", (3, 8, 8), 3, width=4), [draw(40, 3, 8, 8).float()]
    check_keeps_form(lambda merged, ends: regmean(net, merged, ends, images), net, random_ends(net, images))


def test_what_does_not_fit_is_refused() -> None:
    net, data = deep(), [draw(50, 4)]
    state = net.state_dict()
    with pytest.raises(RebasinError, match=r"off_diagonal: expected a number in \[0, 1\]; got 2"):
        regmean(net, state, [state], data, off_diagonal=2)
    with pytest.raises(RebasinError, match="grams: expected 1, one for each end; got 0"):
        regmean(net, state, [state], data, grams=[])
    with pytest.raises(RebasinError, match=r"grams\[0\]: expected a matrix of \(5, 5\) for '0.weight'; got none"):
        regmean(net, state, [state], data, grams=[{}])
    with pytest.raises(CalibrationError, match=r"'0\.weight' hold a NaN or an infinity"):
        regmean(net, state, [state], [torch.full((50, 4), torch.nan, dtype=torch.float64)])


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_grams_of_no_sample_or_that_are_not_finite_are_refused_by_the_place_of_their_end(factor: float) -> None:
    net, data = deep(), [draw(120, 4)]
    state = net.state_dict()
    grams = input_grams(net, state, data)
    wrong = {name: gram * factor for name, gram in grams.items()}
    with pytest.raises(RebasinError, match=r"grams\[1\]: expected finite sums of one sample or more for '0.weight'"):
        regmean(net, state, [state, state], data, grams=[grams, wrong])


def test_an_end_with_a_nan_in_its_last_layer_is_refused_by_its_place() -> None:
    net, data = deep(), [draw(120, 4)]
    state = net.state_dict()
    last = next(name for name in reversed(state) if name.endswith("weight"))
    with pytest.raises(RebasinError, match=rf"ends\[1\]: '{last}', its bias or its BatchNorm holds a NaN"):
        regmean(net, state, [state, {**state, last: state[last] * torch.nan}], data)
