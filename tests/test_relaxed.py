"""Relaxed permutations: at the corners they permute, and the objective over them is the polynomial it is said to be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import networks
import networks_zoo
import numpy as np
import pytest
import torch
from test_matching_families import encoder
from torch import Tensor

from fedrebasin import PermutationSpec, SpecMismatchError, permute, random_perms, trace
from fedrebasin.layout import Each, Fixed, Free, Product
from fedrebasin.matching.grids import grids_of, soft_permute
from fedrebasin.matching.relaxed import best_corner, between, corner, no_logits, soften
from fedrebasin.matching.relaxed_problem import RelaxedProblem, best_point
from fedrebasin.matching.result import inner_product
from fedrebasin.matching.rounded import best_matching
from fedrebasin.perms import Perms

State = dict[str, Tensor]
DOUBLE = torch.zeros((), dtype=torch.float64)

MAKERS: dict[str, Callable[[], Any]] = {
    "encoder": encoder,
    **{name: networks.NETWORKS[name] for name in ("conv", "dense-block", "grouped", "two-inputs")},
    **{name: networks_zoo.ZOO[name] for name in ("bags", "repeats", "fused-norms", "rotary-halves", "gru", "cells")},
}


def spec_of(name: str) -> PermutationSpec:
    return trace(*MAKERS[name]()[:2])


def drawn(spec: PermutationSpec, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in spec.shapes.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_at_permutations_values_are_those_of_permuted_models(name: str) -> None:
    spec = spec_of(name)
    a, b = drawn(spec, 0), drawn(spec, 1)
    problem = RelaxedProblem(spec, a, b)
    for seed in range(2):
        perms = random_perms(spec, seed)
        relaxed, moved = corner(spec, perms, DOUBLE), permute(spec, perms, b)
        for tensor, layouts in spec.axes.items():
            assert torch.equal(soft_permute(grids_of(layouts), relaxed, b[tensor]), moved[tensor]), tensor
        assert float(problem.value(relaxed)) * problem.scale == pytest.approx(inner_product(spec, a, moved), rel=1e-9)
        assert all(torch.equal(order, perms[perm]) for perm, order in best_corner(spec, relaxed).items())


@pytest.mark.parametrize("name", ["grouped", "fused-norms", "gru"])
def test_the_objective_along_a_line_is_a_polynomial_with_the_slope_of_the_gradient(name: str) -> None:
    spec = spec_of(name)
    problem = RelaxedProblem(spec, drawn(spec, 0), drawn(spec, 1))
    start = soften(spec, {perm: zeros + drawn_like(zeros) for perm, zeros in no_logits(spec, DOUBLE).items()})
    perms, value, slope = problem.step(start)
    end = corner(spec, perms, DOUBLE)
    coefficients = problem.polynomial(start, end, slope=slope, at_start=value)
    assert len(coefficients) == problem.degree + 1
    for lam in (0.0, 0.3, 0.77, 1.0):
        expected = float(problem.value(between(start, end, lam)))
        assert np.polynomial.Polynomial(coefficients)(lam) == pytest.approx(expected, rel=1e-8, abs=1e-12)
    ahead = float(problem.value(between(start, end, 1e-6)))
    assert slope == pytest.approx((ahead - value) / 1e-6, rel=1e-3)
    others = [corner(spec, random_perms(spec, seed), DOUBLE) for seed in range(20)]
    _, gradient = problem.gradient(start)
    assert all(sum(float((gradient[p] * (x[p] - start[p])).sum()) for p in gradient) <= slope for x in others)


def drawn_like(zeros: Tensor) -> Tensor:
    return torch.randn(zeros.shape, generator=torch.Generator().manual_seed(3), dtype=zeros.dtype)


@pytest.mark.parametrize("name", ["encoder", "grouped", "repeats"])
def test_softened_numbers_are_doubly_stochastic_heads_and_groups_included(name: str) -> None:
    spec = spec_of(name)
    relaxed = soften(spec, {perm: drawn_like(zeros) for perm, zeros in no_logits(spec, DOUBLE).items()})
    for perm, P in relaxed.items():
        outer = relaxed.get(spec.over.get(perm, ""))
        expected = torch.ones_like(P[..., 0]) if outer is None else outer.unsqueeze(-1).expand(P.shape[:-1])
        assert bool((P >= 0).all())
        for dim in (-1, -2):
            torch.testing.assert_close(P.sum(dim), expected, rtol=0, atol=1e-6)


def test_the_best_corner_of_heads_and_their_units_is_the_best_of_all() -> None:
    layouts = (Product((Free("heads", 2), Free("units", 3, over="heads"))),)
    spec = PermutationSpec({"w": layouts})
    orders = [torch.tensor(order) for order in permutations(range(3))]
    every: list[Perms] = [
        {"heads": torch.tensor(heads), "units": torch.stack([first, second])}
        for heads in ([0, 1], [1, 0])
        for first in orders
        for second in orders
    ]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scores = {
            perm: torch.randn(zeros.shape, generator=generator) for perm, zeros in no_logits(spec, DOUBLE).items()
        }

        def total(perms: Perms, scores: State = scores) -> float:
            return sum(float((scores[perm] * P).sum()) for perm, P in corner(spec, perms, DOUBLE).items())

        assert total(best_corner(spec, scores)) == pytest.approx(max(map(total, every)), rel=1e-6)


def test_units_that_depend_on_a_fixed_leaf_are_told_apart() -> None:
    layouts = (Fixed(2, "halves", "halves"), Each("halves", (Free("a", 3), Free("b", 3))))
    spec = PermutationSpec({"w": layouts})
    perms = {"a": torch.tensor([2, 0, 1]), "b": torch.tensor([1, 0, 2])}
    tensor = torch.arange(6.0).view(2, 3)
    moved = soft_permute(grids_of(layouts), corner(spec, perms, tensor), tensor)
    assert torch.equal(moved, permute(spec, perms, {"w": tensor})["w"])


@pytest.mark.parametrize(
    ("coefficients", "expected"),
    [([0.0, 1.0], 1.0), ([0.0, -1.0], 0.0), ([0.0, 0.0], 1.0), ([0.0, 1.0, -1.0], 0.5), ([0.0, 0.0, 3.0, -3.0], 2 / 3)],
)
def test_the_best_point_of_a_polynomial_is_at_an_end_or_where_it_is_level(
    coefficients: list[float], expected: float
) -> None:
    assert best_point(np.array(coefficients)) == pytest.approx(expected)


def test_values_do_not_depend_on_the_models_scale_and_what_is_not_finite_is_refused() -> None:
    spec = spec_of("conv")
    a, b = ({name: tensor.float() for name, tensor in drawn(spec, seed).items()} for seed in (0, 1))
    relaxed = soften(spec, no_logits(spec, torch.zeros(())))
    huge = {name: 1e30 * tensor for name, tensor in b.items()}
    one, other = (float(RelaxedProblem(spec, a, model).value(relaxed)) for model in (b, huge))
    assert one == pytest.approx(other, rel=1e-4)
    name = next(iter(spec.tied.values()))[0].name
    for value, scale in ((torch.nan, 1), (torch.inf, 1), (1e200, 1e100)):
        broken = {key: tensor.double() for key, tensor in b.items()}
        broken[name] = torch.full_like(broken[name], value) * scale
        with pytest.raises(SpecMismatchError, match=rf"model: '{name}' holds a NaN, an infinity or numbers whose"):
            RelaxedProblem(spec, a, broken)


def test_the_best_candidate_is_kept_wherever_it_comes() -> None:
    spec = spec_of("conv")
    a, b = drawn(spec, 0), drawn(spec, 1)
    problem = RelaxedProblem(spec, a, b)
    start, *others = sorted(
        (random_perms(spec, seed) for seed in range(5)),
        key=lambda perms: float(problem.value(corner(spec, perms, DOUBLE))),
    )
    candidates = [(perms, float(problem.value(corner(spec, perms, DOUBLE)))) for perms in (*others, start)]
    found = best_matching(problem, a, b, start=start, candidates=candidates, started=0.0)
    assert all(torch.equal(order, others[-1][perm]) for perm, order in found.perms.items())
    assert found.objective == inner_product(spec, a, permute(spec, others[-1], b))
    rounded_up = [(start, 2.0)]  # a value that float64 does not confirm
    found = best_matching(problem, a, b, start=others[-1], candidates=rounded_up, started=0.0)
    assert all(torch.equal(order, others[-1][perm]) for perm, order in found.perms.items())
