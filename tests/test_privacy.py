"""Clipped and noised moments: how far one example reaches, what epsilon that is, and who refuses what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated_clients import GIVEN, SENT, Spy, client, data, net, plain, play, same
from flower_messages import small_net, warnings
from flwr.app import Message, RecordDict
from torch import Tensor

from fedrebasin.corrections.federated import Case, Node, answer, correct_federated
from fedrebasin.corrections.moments import Moments
from fedrebasin.corrections.privacy import ClippedMoments, Privacy
from fedrebasin.errors import RebasinError, UsageError
from fedrebasin.strategies import FedRebasin
from fedrebasin.strategies.account import Account
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

#: clips nothing here, and hardly adds noise
LOOSE = Privacy(clip=1e3, noise=1e-12)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("noise", "releases", "delta"), [(2.0, 1, 1e-5), (1.0, 4, 1e-3), (20.0, 30, 1e-6)])
def test_epsilon_is_where_the_divergence_of_two_shifted_gaussians_is_delta(
    noise: float, releases: int, delta: float
) -> None:
    epsilon = Privacy(clip=1.0, noise=noise, delta=delta).epsilon(releases)
    mu = math.sqrt(releases) / noise
    x = np.linspace(-12, 12 + mu, 2_000_001)
    p, q = (np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (mu, 0.0))
    found = np.clip(p - math.exp(epsilon) * q, 0, None).sum() * (x[1] - x[0])
    assert found == pytest.approx(delta, rel=1e-3)


def test_more_releases_and_less_noise_cost_more() -> None:
    privacy = Privacy(clip=1.0, noise=5.0)
    spent = [privacy.epsilon(releases) for releases in (0, 1, 2, 10, 1000)]
    assert spent[0] == 0
    assert spent == sorted(set(spent))
    assert Privacy(clip=1.0, noise=4.0).epsilon(10) > privacy.epsilon(10)


@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 3, 3), (9, 6, 4)])
def test_replacing_one_example_moves_the_sums_by_no_more_than_noise_is_scaled_to(shape: tuple[int, ...]) -> None:
    privacy, dim = Privacy(clip=0.7, noise=1.0), 2 if shape == (9, 6, 4) else 1
    farthest = 0.0
    for scale in (0.1, 1.0, 30.0):
        sums = []
        for sign in (1, -1):
            x = draw(*shape)
            x[3] = sign * scale * (1 if sign > 0 else 1e-3)
            moments = ClippedMoments(privacy)
            moments.add(x[:5], dim)
            moments.add(x[5:], dim)
            sums.append(torch.cat([moments.mean, moments.squares]))
        farthest = max(farthest, float((sums[0] - sums[1]).norm()))
    reach = 2 * 0.7 * math.sqrt(2 * 4)
    assert 0.45 * reach < farthest <= reach


def test_the_noise_has_the_size_that_the_accounting_takes_it_for() -> None:
    moments = ClippedMoments(Privacy(clip=0.5, noise=3.0))
    moments.add(draw(50, 4), dim=1)
    means = torch.stack([moments.release(seed).mean for seed in range(4000)])
    reach = 2 * 0.5 * math.sqrt(8)
    torch.testing.assert_close(means.std(0), torch.full((4,), 3.0 * reach / 50, dtype=torch.float64), rtol=0.05, atol=0)
    assert not torch.equal(moments.release().mean, moments.release().mean)
    assert bool((moments.release().squares >= 0).all())


@pytest.mark.parametrize("shape", [(20, 4), (20, 4, 3, 3)])
def test_without_clipping_and_noise_they_are_the_moments(shape: tuple[int, ...]) -> None:
    exact, clipped = Moments(), ClippedMoments(LOOSE)
    for part in draw(*shape).split(7):
        exact.add(part, 1)
        clipped.add(part, 1)
    found = clipped.release()
    assert found.count == exact.count
    torch.testing.assert_close(found.mean, exact.mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.std, exact.std, rtol=1e-6, atol=1e-8)


def clients(*privacies: Privacy | None) -> dict[int, Any]:
    return {place + 1: client(place, privacy=privacy) for place, privacy in enumerate(privacies)}


def test_a_round_with_private_clients_repairs_and_states_the_largest_epsilon() -> None:
    merged, ends, shares = plain()
    case = Case(net(), merged, ends, shares, draw(2, 5))
    exact = correct_federated("federated-repair", case, [data(place) for place in range(3)])
    low, high = (Privacy(clip=1e3, noise=1e-12, delta=delta) for delta in (1e-3, 1e-5))
    found, metrics, _ = play("federated-repair", clients(low, high, low))
    same(found, exact, 1e-6)
    assert metrics["rebasin-query-epsilon"] == high.epsilon(4)  # two sites, each of two networks
    found, metrics, _ = play("federated-repair", clients(low, None, low))
    same(found, exact, 1e-6)
    assert "rebasin-query-epsilon" not in metrics


def test_over_its_budget_a_client_refuses_and_the_others_go_on(warnings: list[str]) -> None:
    within = Privacy(clip=30.0, noise=50.0)
    tight = Privacy(clip=30.0, noise=50.0, budget=within.epsilon(3))
    found, metrics, grid = play("federated-repair", clients(within, within, tight))
    assert grid.queries == [[1, 2, 3], [1, 2, 3]]  # three releases in the first query, the fourth in the second
    assert metrics["rebasin-query-left-out"] == 1
    assert metrics["rebasin-query-epsilon"] == within.epsilon(4)
    said = "node 3 answered a query with a refusal: 'RebasinError: privacy: 4 releases would be epsilon ="
    assert any(said in line for line in warnings)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_what_is_spent_adds_up_over_rounds_in_the_clients_state() -> None:
    strategy = FedRebasin(**GIVEN, correction="federated-repair", reference="global", fraction_evaluate=0.0)
    privacy = Privacy(clip=30.0, noise=50.0)
    result = strategy.start(Spy(clients(privacy, privacy)), state_to_record(SENT), num_rounds=2)
    stated = [result.train_metrics_clientapp[number]["rebasin-query-epsilon"] for number in (1, 2)]
    assert stated == [privacy.epsilon(4), privacy.epsilon(8)]


@pytest.mark.parametrize(("lost", "spent"), [((), 4), ((1, 2), 3)])
def test_a_resumed_run_counts_on_even_what_was_lost_on_the_way(
    lost: tuple[int, ...], spent: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"correction": "federated-repair", "reference": "global", "fraction_evaluate": 0.0}
    privacy = Privacy(clip=30.0, noise=50.0)
    for rounds, lose in ((1, lost), (2, ())):
        strategy = FedRebasin(**GIVEN, **options, checkpoint_dir=tmp_path)
        result = strategy.start(Spy(clients(privacy, privacy), lose), state_to_record(SENT), num_rounds=rounds)
    assert result.train_metrics_clientapp[2]["rebasin-query-epsilon"] == privacy.epsilon(spent + 4)
    tight = Privacy(clip=30.0, noise=50.0, budget=privacy.epsilon(spent + 4))
    result = strategy.start(Spy(clients(tight, tight)), state_to_record(SENT), num_rounds=3)
    assert result.train_metrics_clientapp[3]["rebasin-query-left-out"] == 2


@pytest.mark.parametrize("count", ['"many"', "1e999"])
def test_a_count_that_cannot_be_read_is_refused(count: str, tmp_path: Path) -> None:
    (tmp_path / "releases.json").write_text(f'{{"releases": {count}}}')
    strategy = FedRebasin(**GIVEN, correction="federated-repair", checkpoint_dir=tmp_path)
    with pytest.raises(UsageError, match=r"releases.json', which counts .* cannot be read .* give another folder"):
        strategy.start(Spy(clients(LOOSE)), state_to_record(SENT), num_rounds=1)


def test_moments_that_depend_on_the_others_of_a_batch_are_refused() -> None:
    batches = [draw(20, 5)]
    with pytest.raises(RebasinError, match="privacy: all sites at once go by the statistics of a batch"):
        answer("moments", {"merged-sites": ["1"], "sequential": False}, Node(net(), SENT, {}, batches, privacy=LOOSE))
    bare = small_net(norm=False).double()
    about: dict[str, Any] = {"merged-sites": ["0"], "sequential": False}
    assert len(answer("moments", about, Node(bare, bare.state_dict(), {}, batches, privacy=LOOSE))) == 3


def test_privacy_that_means_nothing_is_refused() -> None:
    for options, message in (
        ({"clip": 0.0, "noise": 1.0}, "clip: expected a positive number; got 0"),
        ({"clip": 1.0, "noise": math.nan}, "noise: expected a positive number; got nan"),
        ({"clip": 1.0, "noise": 1.0, "delta": 1.0}, "delta: expected a number between 0 and 1; got 1"),
        ({"clip": 1.0, "noise": 1.0, "budget": -1.0}, "budget: expected a positive number; got -1"),
    ):
        with pytest.raises(RebasinError, match=message):
            Privacy(**options)


def test_the_epsilon_travels_beside_the_sums() -> None:
    seen: list[RecordDict] = []

    def spy(message: Message, reply: Message) -> Message:
        seen.append(reply.content)
        return reply

    play("federated-repair", {1: client(0, spy, privacy=LOOSE), 2: client(1)})
    assert dict(seen[0].config_records["privacy"]) == {"releases": 3, "epsilon": LOOSE.epsilon(3), "delta": 1e-5}
    assert set(record_to_state(seen[0].array_records["sums"])) >= {"merged.1.mean", "end.3.squares"}


def test_releases_are_counted_node_by_node_and_only_where_they_are_written_down(tmp_path: Path) -> None:
    counts = []
    for folder in (None, tmp_path):
        account = Account(folder)
        for server_round in range(20):
            account.add(range(10 * server_round, 10 * server_round + 10), 3)  # new nodes in every round
        counts.append(len(account._asked))
    account.add([5], 3)
    account.add([6], 1)
    assert counts == [0, 200] and Account(tmp_path).before == 6
