"""Federated corrections: the sums of nodes give what the pooled data gives, and never more than a node has to send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corrections_ends import random_ends, run
from networks_by_hand import Functions
from torch import Tensor, nn

from fedrebasin import merge, repair
from fedrebasin.corrections.federated import Case, FederatedOptions, correct_federated
from fedrebasin.simulations.models import build_model

State = dict[str, Tensor]
SHARES = [0.5, 0.2, 0.3]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def free_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()


#: three nodes whose data differ in place, scale and size
OWN = [[draw(40, 4), draw(35, 4, seed=1)], [2 + 0.5 * draw(50, 4, seed=2)], [3 * draw(110, 4, seed=3) - 1]]


def case_of(net: nn.Module, ends: list[State], example: Any, **options: Any) -> Case:
    shares = SHARES[: len(ends)]
    return Case(net, merge(ends, coefficients=shares), ends, shares, example, FederatedOptions(**options))


def test_least_squares_of_sums_equals_numpys_on_the_pooled_rows_with_each_nodes_own_goals() -> None:
    net = deep()
    ends = random_ends(net, count=3)
    found = correct_federated("federated-least-squares", case_of(net, ends, draw(2, 4), ridge=0.0), OWN)
    rows = [torch.cat(batches) for batches in OWN]
    own, theirs = torch.cat(rows), rows
    for place in ("0", "2", "4"):
        z = [F.linear(h, end[f"{place}.weight"], end[f"{place}.bias"]) for h, end in zip(theirs, ends, strict=True)]
        design = np.column_stack([own.numpy(), np.ones(len(own))])
        expected = np.linalg.lstsq(design, torch.cat(z).numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[f"{place}.weight"].numpy(), expected[:-1].T, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found[f"{place}.bias"].numpy(), expected[-1], rtol=1e-6, atol=1e-8)
        own = torch.tanh(F.linear(own, found[f"{place}.weight"], found[f"{place}.bias"]))
        theirs = [torch.tanh(one) for one in z]


def test_the_ridge_is_the_best_on_the_rows_that_all_nodes_hold_out() -> None:
    net = nn.Sequential(nn.Linear(4, 3)).double()
    ends = random_ends(net, count=3)
    found = correct_federated("federated-least-squares", case_of(net, ends, draw(2, 4)), OWN)
    best: tuple[float, Tensor] = (float("inf"), torch.zeros(()))
    rows = [torch.cat(batches) for batches in OWN]
    held = torch.cat([torch.arange(len(x)) % 5 == 4 for x in rows])
    x = torch.cat(rows)
    z = torch.cat([F.linear(own, end["0.weight"], end["0.bias"]) for own, end in zip(rows, ends, strict=True)])
    merged = merge(ends, coefficients=SHARES)
    residual = z - F.linear(x, merged["0.weight"], merged["0.bias"])

    def solve(mask: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        h, r = x[mask] - x[mask].mean(0), residual[mask] - residual[mask].mean(0)
        G = h.T @ h / len(h)
        D = torch.linalg.solve(G + ridge * G.diagonal().mean() * torch.eye(4, dtype=G.dtype), h.T @ r / len(h))
        return D, residual[mask].mean(0) - x[mask].mean(0) @ D

    for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        D, d = solve(~held, ridge)
        error = float((residual[held] - x[held] @ D - d).square().sum(1).mean())
        if error < best[0]:
            best = (error, merged["0.weight"] + solve(held | True, ridge)[0].T)
    torch.testing.assert_close(found["0.weight"], best[1], rtol=1e-8, atol=1e-10)


def test_least_squares_gives_a_free_batchnorm_the_statistics_of_all_nodes_rows() -> None:
    net = free_norm()
    ends = random_ends(net, [torch.cat(OWN[0])], count=3)
    found = correct_federated("federated-least-squares", case_of(net, ends, draw(2, 4)), OWN)
    x = torch.tanh(F.linear(torch.cat([torch.cat(own) for own in OWN]), found["0.weight"], found["0.bias"]))
    torch.testing.assert_close(found["2.running_mean"], x.mean(0), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found["2.running_var"], x.var(0), rtol=1e-8, atol=1e-10)


def test_the_label_prior_comes_off_each_nodes_own_last_goals_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    ends = random_ends(net, count=2)
    rows = [torch.cat(OWN[0]), OWN[1][0]]
    labels = [torch.arange(75) % 2, torch.arange(50) % 3]
    data = [[(x, y)] for x, y in zip(rows, labels, strict=True)]
    plain = correct_federated("federated-least-squares", case_of(net, ends, draw(2, 4), ridge=0.0), data)
    options = {"ridge": 0.0, "label_prior": True}
    found = correct_federated("federated-least-squares", case_of(net, ends, draw(2, 4), **options), data)
    torch.testing.assert_close(found["0.weight"], plain["0.weight"], rtol=0, atol=0)
    goals, inputs = [], []
    for x, y, end in zip(rows, labels, ends, strict=True):
        counts = torch.tensor([max(1, int((y == label).sum())) for label in range(3)]).double()
        goals.append(run(net, end, x) - (counts / counts.sum()).log())
        hidden = torch.tanh(F.linear(x, found["0.weight"], found["0.bias"]))
        inputs.append(torch.cat([hidden, hidden.new_ones(len(x), 1)], 1))
    expected = torch.linalg.lstsq(torch.cat(inputs), torch.cat(goals)).solution
    torch.testing.assert_close(found["2.weight"], expected[:-1].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["2.bias"], expected[-1], rtol=1e-6, atol=1e-8)


def images(seed: int, count: int = 60) -> Tensor:
    return draw(count, 3, 8, 8, seed=seed)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "norm-free": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 6), nn.Linear(6, 3)),
    "batchnorm": lambda: build_model("conv", (3, 8, 8), 3, width=6),
    "layernorm": lambda: build_model("conv", (3, 8, 8), 3, width=6, norm="layer"),
    "groupnorm": networks.Grouped,
    "functions": Functions,
}


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_repair_equals_the_servers_where_all_nodes_hold_the_same_data(name: str, sequential: bool) -> None:
    net, data = MAKERS[name]().double(), [images(0), images(1)]
    ends = random_ends(net, data, count=3)
    case = case_of(net, ends, images(9, 2), sequential=sequential)
    found = correct_federated("federated-repair", case, [data] * 3)
    expected = repair(net, case.merged, ends, data, coefficients=SHARES, sequential=sequential)
    assert any(not torch.equal(expected[key], tensor) for key, tensor in case.merged.items())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-11)


def _averaged(values: list[Tensor]) -> Tensor:
    return sum((share * value for share, value in zip(SHARES, values, strict=True)), torch.zeros(()))


def test_repairs_gain_and_shift_are_quotient_and_difference_of_weighted_means_on_own_data() -> None:
    net = deep()
    ends = random_ends(net, count=3)
    case = case_of(net, ends, draw(2, 4), max_gain=1e6)
    found = correct_federated("federated-repair", case, OWN)
    ours = theirs = [torch.cat(batches) for batches in OWN]
    for place in ("0", "2"):
        weight, bias = case.merged[f"{place}.weight"], case.merged[f"{place}.bias"]
        x = [F.linear(h, weight, bias) for h in ours]
        z = [F.linear(h, end[f"{place}.weight"], end[f"{place}.bias"]) for h, end in zip(theirs, ends, strict=True)]
        stds = [_averaged([one.std(0, correction=0) for one in rows]) for rows in (z, x)]
        means = [_averaged([one.mean(0) for one in rows]) for rows in (z, x)]
        gain = stds[0] / stds[1]
        shift = means[0] - gain * means[1]
        torch.testing.assert_close(found[f"{place}.weight"], gain.unsqueeze(1) * weight, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[f"{place}.bias"], gain * bias + shift, rtol=1e-9, atol=1e-11)
        ours, theirs = [torch.tanh(gain * one + shift) for one in x], [torch.tanh(one) for one in z]
    torch.testing.assert_close(found["4.weight"], case.merged["4.weight"], rtol=0, atol=0)


def test_a_difference_between_the_nodes_data_is_no_reason_to_repair() -> None:
    net = deep()
    (end,) = random_ends(net, count=1)
    found = correct_federated("federated-repair", case_of(net, [end] * 3, draw(2, 4)), OWN)
    for key, tensor in end.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-11)


def test_repair_gives_a_batchnorm_the_statistics_of_the_mixture_of_the_nodes() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    ends = random_ends(net, [torch.cat(OWN[0])], count=3)
    case = case_of(net, ends, draw(2, 4))
    found = correct_federated("federated-repair", case, OWN)
    x = [F.linear(torch.cat(own), case.merged["0.weight"], case.merged["0.bias"]) for own in OWN]
    mean = _averaged([one.mean(0) for one in x])
    spread = [one.var(0) + (one.mean(0) - mean).square() for one in x]
    torch.testing.assert_close(found["1.running_mean"], mean, rtol=1e-9, atol=1e-11)
    expected = _averaged(spread)
    torch.testing.assert_close(found["1.running_var"], expected, rtol=1e-9, atol=1e-11)
    ours = _averaged([one.std(0, correction=0) for one in x])
    z = [
        run(net[:2], {key: end[key] for key in net[:2].state_dict()}, torch.cat(own))
        for own, end in zip(OWN, ends, strict=True)
    ]
    goal = _averaged([one.std(0, correction=0) for one in z])
    gain = goal / (case.merged["1.weight"].abs() * ours / (expected + 1e-5).sqrt())
    torch.testing.assert_close(found["1.weight"], gain * case.merged["1.weight"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found["1.bias"], _averaged([one.mean(0) for one in z]), rtol=1e-9, atol=1e-11)
    given = [run(net[:2], {key: found[key] for key in net[:2].state_dict()}, torch.cat(own)) for own in OWN]
    torch.testing.assert_close(_averaged([one.std(0, correction=0) for one in given]), goal, rtol=1e-9, atol=1e-11)
