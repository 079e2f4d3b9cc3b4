"""Clipped and noised Gram matrices and normal equations: how far one example reaches, and what is made of noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from corrections_ends import random_ends
from federated_clients import data, net, plain, play, same
from flower_messages import warnings
from hypothesis import given, settings
from hypothesis import strategies as st
from test_federated_corrections import MAKERS, OWN, case_of, deep, draw, images
from test_privacy import LOOSE, clients
from torch import Tensor, nn

from fedrebasin.corrections.federated import FEDERATED, Case, Node, answer, correct_federated, count_releases
from fedrebasin.corrections.label_prior import log_prior
from fedrebasin.corrections.noised_sums import read_noise, shrunk, solve_noised
from fedrebasin.corrections.normal_equations import NormalEquations
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.corrections.private_sums import ClippedEquations
from fedrebasin.errors import RebasinError

__all__ = ["warnings"]

SUMS = ("federated-least-squares", "federated-regmean")


def summed(privacy: Privacy, X: Tensor, E: Tensor | None, positions: int) -> ClippedEquations:
    sums = ClippedEquations(privacy)
    half = X.shape[1] // (2 * positions) * positions
    for part in (slice(half), slice(half, None)):
        sums.add_clipped(X[:, part], None if E is None else E[:, part], positions=positions)
    return sums


def released_vector(sums: ClippedEquations) -> Tensor:
    """What gets noise of one size, as the module's text has it: a symmetric matrix's entries, off-diagonals once."""
    m = len(sums.x)
    t = 0.5 * sums.privacy.clip * math.sqrt(m)
    upper = torch.triu_indices(m, m, 1)
    parts = [sums.gram.diagonal(), math.sqrt(2) * sums.gram[upper[0], upper[1]], math.sqrt(2) * t * sums.x]
    parts.append(torch.tensor([t**2 * sums.weight], dtype=torch.float64))
    if sums.cross.ndim:
        g = 0.5 * math.sqrt(m / len(sums.e))
        parts += [math.sqrt(2) * g * sums.cross.flatten(), math.sqrt(2) * g * t * sums.e]
    return torch.cat(parts)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.booleans(),
)
def test_replacing_one_example_moves_the_sums_by_no_more_than_noise_is_scaled_to(
    seed: int, m: int, out: int, positions: int, scale: float, goals: bool
) -> None:
    privacy = Privacy(clip=0.7, noise=1.0)
    X, E = draw(m, 6 * positions, seed=seed), draw(out, 6 * positions, seed=seed + 1)
    other_X, other_E = X.clone(), E.clone()
    place = slice(2 * positions, 3 * positions)
    other_X[:, place] = scale * draw(m, positions, seed=seed + 2)
    other_E[:, place] = scale * draw(out, positions, seed=seed + 3)
    vectors = [
        released_vector(summed(privacy, x, e if goals else None, positions)) for x, e in ((X, E), (other_X, other_E))
    ]
    bound = 0.7**2 * m * (1.5 if goals else 1.25)
    assert float((vectors[0] - vectors[1]).norm()) <= math.sqrt(2) * bound * (1 + 1e-9)


def test_the_bound_is_not_larger_than_it_has_to_be() -> None:
    vectors = []
    for place in (0, 1):
        X = torch.full((50, 1), 1e-9, dtype=torch.float64)
        X[place] = 1e6
        vectors.append(released_vector(summed(Privacy(clip=1.0, noise=1.0), X, None, 1)))
    assert float((vectors[0] - vectors[1]).norm()) == pytest.approx(math.sqrt(2) * 50 * 1.25, rel=1e-3)


def test_an_example_that_holds_a_nan_or_an_infinity_reaches_no_further() -> None:
    X = draw(3, 8)
    X[:, 2] = torch.tensor([math.nan, math.inf, -math.inf])
    assert bool(released_vector(summed(Privacy(clip=0.7, noise=1.0), X, draw(2, 8), 1)).isfinite().all())


def test_the_noise_has_the_size_that_is_stated_and_that_the_accounting_takes_it_for() -> None:
    X, E = 0.1 * draw(4, 30), 0.1 * draw(3, 30, seed=1)  # so short that every weight is 1
    found = []
    for seed in range(3000):
        sums = summed(Privacy(clip=0.5, noise=1e-3), X, E, 1)
        before = released_vector(sums)
        sums.release(seed)
        # what the division by the weights did is undone, it is free
        scale = sums.noise[0] / (1e-3 * 0.25 * 4 * 1.5)
        for name in ("gram", "x", "cross", "e"):
            setattr(sums, name, getattr(sums, name) / scale)
        found.append(released_vector(sums) - before)
    reach = 1e-3 * math.sqrt(2) * 0.25 * 4 * 1.5
    std = torch.stack(found).std(0)
    torch.testing.assert_close(std, torch.full_like(std, reach), rtol=0.06, atol=0)
    noise, t, g = sums.noise[0], 0.5 * 0.5 * 2, 0.5 * math.sqrt(4 / 3)
    assert sums.noise == pytest.approx((noise, noise / t, noise / g, noise / (g * t)))
    assert noise / scale == pytest.approx(reach / math.sqrt(2))


def test_without_a_seed_no_noise_is_drawn_twice() -> None:
    grams = [summed(Privacy(clip=1.0, noise=1.0), draw(3, 8), None, 1).release().gram for _ in range(2)]
    assert not torch.equal(*grams)
    torch.testing.assert_close(grams[0], grams[0].T)


@pytest.mark.parametrize("name", [*MAKERS, "deep"])
@pytest.mark.parametrize("correction", SUMS)
def test_where_nothing_is_clipped_and_noise_is_small_they_are_the_exact_ones(correction: str, name: str) -> None:
    model = deep() if name == "deep" else MAKERS[name]().double()
    rows: list[list[Tensor]] = OWN if name == "deep" else [[images(0), images(1)], [images(2)], [images(3)]]
    ends = random_ends(model, rows[0], count=3)
    case = case_of(model, ends, rows[0][0][:2], ridge=0.1)
    exact = correct_federated(correction, case, rows)
    found = correct_federated(correction, case, rows, privacy=Privacy(clip=30.0, noise=1e-13))
    assert any(not torch.equal(found[key], tensor) for key, tensor in exact.items())
    for key, tensor in exact.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-2, atol=1e-3)  # a variance is divided by examples - 1


@pytest.mark.parametrize("correction", SUMS)
def test_a_round_with_private_clients_corrects_by_sums_and_states_epsilon(correction: str) -> None:
    merged, ends, shares = plain()
    privacy = Privacy(clip=30.0, noise=1e-12, budget=1e30)
    found, metrics, _ = play(correction, clients(privacy, privacy, privacy))
    assert metrics["rebasin-query-left-out"] == 0
    assert metrics["rebasin-query-epsilon"] == privacy.epsilon(3)  # as many as layers
    exact = correct_federated(correction, Case(net(), merged, ends, shares, draw(2, 5)), [data(k) for k in range(3)])
    if correction == "federated-regmean":
        same(found, exact, 1e-4)


@pytest.mark.parametrize("correction", SUMS)
def test_noise_alone_leaves_the_merged_model_nearly_as_it_is(correction: str) -> None:
    model = deep()
    ends = random_ends(model, count=3)
    case = case_of(model, ends, draw(2, 4))
    found = correct_federated(correction, case, OWN, privacy=Privacy(clip=1.0, noise=1e5))
    for key, tensor in case.merged.items():
        distance = float((found[key] - tensor).norm() / tensor.norm())
        assert distance < (1e-12 if correction == "federated-least-squares" else 0.8), key


def test_a_solution_is_kept_only_if_it_is_better_beyond_the_noise() -> None:
    W = draw(2, 4)
    exact = [NormalEquations(), NormalEquations()]
    for seed, sums in enumerate(exact):
        X = draw(4, 500, seed=seed)
        sums.add(X, W @ X)
        sums.noise = (1.0, 1.0, 1.0, 1.0)
    _, D, _ = solve_noised(*exact, None, intercept=True)
    torch.testing.assert_close(D, W, rtol=0.05, atol=0.05)
    for sums in exact:
        sums.noise = (1e4, 1e4, 1e4, 1e4)
    _, D, d = solve_noised(*exact, None, intercept=True)
    assert not bool(D.any()) and not bool(d.any())


def test_shrinking_leaves_what_is_far_above_the_noise_and_nothing_of_noise() -> None:
    noise = draw(1000)
    assert float((shrunk(noise, 1.0) / noise).abs().max()) < 0.15
    torch.testing.assert_close(shrunk(100 + noise, 1.0), 100 + noise, rtol=1e-3, atol=0)


def test_epsilon_counts_every_release_of_an_answer() -> None:
    assert count_releases("grams", {"limit": 0, "layers": ["a", "b", "c"]}) == 3
    assert count_releases("equations", {"step": "a", "split": True, "label-prior": False}) == 1
    assert count_releases("equations", {"step": "a", "split": True, "label-prior": True}) == 2
    assert count_releases("equations", {"step": "a"}) == 1
    # hand-computed: 3 releases at noise 2 are mu = 0.866; Phi(-3.89) - exp(3.75) Phi(-4.76) = 1e-5 near epsilon 3.68
    mu = math.sqrt(3) / 2
    epsilon = Privacy(clip=1.0, noise=2.0).epsilon(3)

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    delta = normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "about", "message"),
    [
        ("losses", {}, "privacy: answers to 'losses' are not noised"),
        ("grams", {"limit": 10}, "privacy: the query does not name its layers"),
    ],
)
def test_a_private_node_refuses_what_it_cannot_account_for(kind: str, about: Any, message: str) -> None:
    with pytest.raises(RebasinError, match=message):
        count_releases(kind, about)


def test_a_private_node_refuses_networks_and_labels_in_which_examples_mix() -> None:
    mixed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    about: dict[str, Any] = {"limit": 10**6, "layers": ["0.weight"]}
    with pytest.raises(RebasinError, match="privacy: a BatchNorm goes by each batch's statistics"):
        answer("grams", about, Node(mixed, {}, mixed.state_dict(), [draw(8, 4)], privacy=LOOSE))
    several = [(draw(4, 2), torch.zeros(4, 5, dtype=torch.int64))]
    with pytest.raises(RebasinError, match="label_prior takes one target an example"):
        log_prior(Node(nn.Linear(2, 1), {}, {}, several, privacy=LOOSE), 2)


def test_label_shares_of_a_private_node_are_noised() -> None:
    batches = [(draw(4, 2), torch.tensor([0, 0, 0, 1]))]
    exact = log_prior(Node(nn.Linear(2, 1), {}, {}, batches), 2)
    torch.testing.assert_close(log_prior(Node(nn.Linear(2, 1), {}, {}, batches, privacy=LOOSE), 2), exact)
    loud = Privacy(clip=1.0, noise=1.0)
    assert not torch.allclose(log_prior(Node(nn.Linear(2, 1), {}, {}, batches, privacy=loud), 2), exact, atol=1e-6)


def test_a_stated_noise_that_is_none_is_refused() -> None:
    for wrong in (torch.tensor([1.0]), torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([math.nan, 0.0, 0.0, 0.0])):
        with pytest.raises(RebasinError, match="four finite numbers from 0 are expected"):
            read_noise({"fit.noise": wrong}, "fit.noise")


def test_all_corrections_are_accounted_for() -> None:
    model = deep()
    for name, correction in FEDERATED.items():
        query = next(correction(case_of(model, random_ends(model, count=3), draw(2, 4))))
        assert count_releases(query.kind, query.about) > 0, name
