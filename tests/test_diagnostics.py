"""How alike layers are: against slow formulas, invariances, planted permutations, and over batches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group
from torch import Tensor, nn

from fedrebasin import (
    align,
    layer_similarity,
    linear_cka,
    permute,
    procrustes_distance,
    random_perms,
    relative_similarity,
    trace,
    unit_correlation,
)
from fedrebasin.diagnostics.measures import MEASURES
from fedrebasin.errors import CalibrationError, RebasinError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(5, 40, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def turned(x: Tensor) -> Tensor:
    rotation = torch.from_numpy(ortho_group.rvs(len(x), random_state=1))
    return 3 * (rotation @ x) + torch.arange(len(x)).unsqueeze(1)


def hsic_of_tuples(K: Tensor, L: Tensor) -> float:
    """The U-statistic as it is defined: a mean over all quadruples of different examples."""
    quadruples = list(itertools.permutations(range(len(K)), 4))
    return sum(float(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])) for i, j, q, r in quadruples) / len(quadruples)


def test_cka_is_the_mean_over_quadruples_of_examples() -> None:
    x, y = X[:, :7], Y[:3, :7] + X[:3, :7]
    K, L = x.T @ x, y.T @ y
    expected = hsic_of_tuples(K, L) / math.sqrt(hsic_of_tuples(K, K) * hsic_of_tuples(L, L))
    assert linear_cka(x, y) == pytest.approx(expected)


def test_cka_of_many_examples_is_the_centred_formula() -> None:
    x = torch.randn(4, 3000, generator=GENERATOR, dtype=torch.float64)
    y = x[:3] + torch.randn(3, 3000, generator=GENERATOR, dtype=torch.float64)
    a, b = (one - one.mean(1, keepdim=True) for one in (x, y))
    biased = (a @ b.T).square().sum() / ((a @ a.T).norm() * (b @ b.T).norm())
    assert linear_cka(x, y) == pytest.approx(float(biased), abs=2e-3)
    assert abs(linear_cka(X, Y)) < 0.2  # the biased one is far above 0 for as few examples


def test_procrustes_is_the_distance_after_the_best_rotation() -> None:
    x, y = ((one - one.mean(1, keepdim=True)).T.numpy() for one in (X, Y))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    rotation, _ = orthogonal_procrustes(x, y)
    assert procrustes_distance(X, Y) == pytest.approx(np.linalg.norm(x @ rotation - y))


def test_relative_representations_are_cosines_with_the_anchors() -> None:
    value = 0.0
    sides = [one.T - one.mean(1) for one in (X, Y)]
    for n in range(40):
        relative = [torch.cosine_similarity(side[n], side, dim=1) for side in sides]
        value += float(torch.cosine_similarity(relative[0], relative[1], dim=0)) / 40
    assert relative_similarity(X, Y) == pytest.approx(value)


def test_unit_correlation_is_the_mean_of_the_units_own() -> None:
    expected = np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(X.numpy(), (X + Y).numpy(), strict=True)])
    assert unit_correlation(X, X + Y) == pytest.approx(expected)


def test_rotations_change_the_correlation_of_units_alone() -> None:
    assert linear_cka(X, turned(X)) == pytest.approx(1)
    assert procrustes_distance(X, turned(X)) == pytest.approx(0, abs=1e-6)
    assert relative_similarity(X, turned(X)) == pytest.approx(1)
    assert unit_correlation(X, turned(X)) < 0.9
    for measure in (linear_cka, procrustes_distance, relative_similarity):
        assert measure(X, turned(Y)) == pytest.approx(measure(X, Y))


@pytest.mark.parametrize("measure", ["correlation", "procrustes"])
def test_moments_over_batches_are_those_of_all(measure: str) -> None:
    parts, whole = MEASURES[measure](), MEASURES[measure]()
    whole.add(X, Y)
    for start, stop in ((0, 1), (1, 30), (30, 40)):
        parts.add(X[:, start:stop], Y[:, start:stop])
    assert parts.value() == pytest.approx(whole.value())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.out = nn.Linear(8 * 16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        result: Tensor = self.out(torch.relu(self.hidden(x)))
        return result


def test_alignment_raises_the_units_correlation_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    net, other = Net(), Net()
    images = torch.randn(60, 3, 6, 6)
    spec, a = trace(net, (images,)), net.state_dict()
    b = {name: tensor + 0.01 * torch.randn_like(tensor.float()) for name, tensor in a.items() if tensor.ndim}
    b = permute(spec, random_perms(spec, 1), {**a, **b})
    batches = [images[:30], images[30:]]
    aligned = align(spec, a, b)
    for measure in ("cka", "procrustes", "relative"):
        plain = layer_similarity(spec, net, a, b, batches, measure=measure)
        assert list(plain) == ["conv", "hidden", "out"]
        assert layer_similarity(spec, net, a, aligned, batches, measure=measure) == pytest.approx(plain, abs=1e-4)
    plain, after = (layer_similarity(spec, net, a, state, batches) for state in (b, aligned))
    assert all(after[name] > plain[name] + 0.3 for name in ("conv", "hidden")) and after["hidden"] > 0.9
    assert plain["out"] == pytest.approx(after["out"], abs=1e-4)
    far = layer_similarity(spec, net, a, other.state_dict(), batches, measure="cka")
    near = layer_similarity(spec, net, a, b, batches, measure="cka")
    assert far["hidden"] < near["hidden"] and near["hidden"] > 0.9


def test_what_layers_write_is_what_modules_return() -> None:
    net, images = Net().eval(), torch.randn(20, 3, 6, 6)
    other = Net().eval()
    spec = trace(net, (images,))
    found = layer_similarity(spec, net, net.state_dict(), other.state_dict(), [images], measure="cka")
    with torch.no_grad():
        assert found["conv"] == pytest.approx(
            linear_cka(net.conv(images).movedim(1, 0), other.conv(images).movedim(1, 0))
        )
        assert found["out"] == pytest.approx(linear_cka(net(images).T, other(images).T))


def test_attention_is_seen_projection_by_projection() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inputs, state = torch.randn(6, 5, 8), net.state_dict()
    found = layer_similarity(trace(net, (inputs,)), net, state, state, [inputs], measure="cka")
    assert {"self_attn query", "self_attn value", "linear1"} <= set(found)
    assert all(value == pytest.approx(1) for value in found.values())


def test_arguments_that_do_not_fit_are_refused() -> None:
    net = nn.Linear(2, 2)
    spec, state = trace(net, (torch.randn(2, 2),)), net.state_dict()
    with pytest.raises(RebasinError, match="measure: expected one of correlation, cka, procrustes, relative; got 'r2'"):
        layer_similarity(spec, net, state, state, [torch.randn(5, 2)], measure="r2")
    with pytest.raises(CalibrationError, match="batches of 4 examples and more; got 3"):
        layer_similarity(spec, net, state, state, [torch.randn(3, 2)], measure="cka")
    with pytest.raises(CalibrationError, match="holds a NaN"):
        layer_similarity(spec, net, state, state, [torch.full((5, 2), math.nan)])
    with pytest.raises(CalibrationError, match=r"of one shape twice; got \(5, 40\) and \(4, 40\)"):
        unit_correlation(X, X[:4])
    with pytest.raises(CalibrationError, match=r"as many examples twice; got \(5, 40\) and \(5, 39\)"):
        linear_cka(X, X[:, :39])
