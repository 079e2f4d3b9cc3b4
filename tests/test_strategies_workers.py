"""Several replies at once: the same model, each on its part of the threads, and what fails costs one reply."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from flower_messages import State, answer, configure, play_round, warnings
from flwr.serverapp.strategy import FedAvg
from test_strategies_exact import same_bytes
from trained_replies import fresh, strategy_around, trained

from fedrebasin import Matching, permute, random_perms
from fedrebasin.errors import UsageError
from fedrebasin.matching.certificate import IdentityCertificate
from fedrebasin.strategies import workers
from fedrebasin.strategies.matcher import Matcher
from fedrebasin.strategies.workers import Workers

__all__ = ["warnings"]
SENT: State = fresh().state_dict()


@pytest.fixture
def threads() -> Iterator[int]:
    """Four threads, however many this process may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "cores", lambda: 4)
        yield 4
    torch.set_num_threads(before)


def replies(kind: str) -> list[State]:
    near = trained("near")
    if kind == "apart":
        return trained("apart")
    if kind == "near":
        return near
    spec = strategy_around(FedAvg()).spec
    return [near[0], permute(spec, random_perms(spec, 1), near[1]), permute(spec, random_perms(spec, 2), near[2])]


@pytest.mark.parametrize("reference", ["auto", "global", "largest"])
@pytest.mark.parametrize("kind", ["near", "apart", "permuted"])
def test_the_model_does_not_depend_on_how_many_replies_are_looked_at_at_once(
    kind: str, reference: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()
    plain = Matcher.__call__

    def call(self: Matcher, reference: State, model: State) -> Matching:
        used.add(threading.current_thread().name)
        time.sleep(0.02)  # long enough for the other threads to begin
        return plain(self, reference, model)

    monkeypatch.setattr(Matcher, "__call__", call)
    found = {}
    for limit in (1, 2, 3, 8, None):
        used.clear()
        strategy = strategy_around(FedAvg(), reference=reference, replies_at_once=limit)
        found[limit] = play_round(strategy, SENT, replies(kind))
        assert limit != 1 or used <= {"MainThread"}
        assert limit == 1 or used != {"MainThread"}
    model, metrics = found[1]
    assert model is not None
    assert metrics is not None
    for other, figures in found.values():
        assert other is not None
        assert figures is not None
        assert same_bytes(model, other)
        assert figures["rebasin-moved-fraction"] == metrics["rebasin-moved-fraction"]
        assert figures["rebasin-objective-gain"] == pytest.approx(metrics["rebasin-objective-gain"], rel=1e-5)


def test_never_more_at_once_than_the_limit_and_the_threads_and_each_has_its_part(threads: int) -> None:
    lock, running = threading.Lock(), 0

    def look(item: int) -> tuple[int, int, int]:
        nonlocal running
        with lock:
            running += 1
            here = running
        time.sleep(0.01)
        with lock:
            running -= 1
        return item, here, torch.get_num_threads()

    for limit, most, part in [(1, 1, 4), (2, 2, 2), (3, 3, 1), (4, 4, 1), (100, 4, 1), (None, 4, 1)]:
        found = Workers(limit).map(look, range(8))
        assert [item for item, _, _ in found] == list(range(8))
        assert max(count for _, count, _ in found) == most
        assert {own for _, _, own in found} == {part}
    assert Workers(None, torch.device("meta")).most == 1


def test_torchs_threads_are_put_back_also_for_threads_that_begin_later(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        Workers(2).map(lambda item: 1 // item, [1, 0, 2])
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *seen] == [4, 4]


def test_what_is_raised_is_the_first_items_and_nothing_begins_after_it(threads: int) -> None:
    begun: list[int] = []

    def fail(item: int) -> None:
        begun.append(item)
        time.sleep(0.1 if item == 0 else 0.02)  # the second one is the first to fail
        raise ValueError(str(item))

    with pytest.raises(ValueError, match="0"):
        Workers(2).map(fail, range(50))
    assert len(begun) < 20


def test_a_users_limit_on_threads_is_a_limit_on_replies_at_once(threads: int) -> None:
    torch.set_num_threads(1)
    assert Workers(8).map(lambda _: threading.current_thread().name, range(3)) == ["MainThread"] * 3


@pytest.mark.parametrize("reference", ["global", "largest"])
@pytest.mark.parametrize("limit", [1, 4])
def test_what_fails_for_one_reply_costs_that_node_alone(
    reference: str, limit: int, threads: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    states = replies("apart")
    expected, _ = play_round(
        strategy_around(FedAvg(), reference=reference), SENT, [states[0], states[2]], examples=[10, 30]
    )
    plain = Matcher.__call__

    def call(self: Matcher, reference: State, model: State) -> Matching:
        if torch.equal(model["0.weight"], states[1]["0.weight"]):
            raise RuntimeError("out of memory")
        return plain(self, reference, model)

    monkeypatch.setattr(Matcher, "__call__", call)
    strategy = strategy_around(FedAvg(), reference=reference, replies_at_once=limit)
    found, metrics = play_round(strategy, SENT, states, examples=[10, 20, 30])
    assert expected is not None
    assert found is not None
    assert metrics is not None
    assert same_bytes(expected, found)
    assert metrics["rebasin-left-out"] == 1
    assert warnings == [
        "rebasin: node 2's reply cannot be aligned (RuntimeError: out of memory); left out of this round"
    ]


@pytest.mark.parametrize("failing", ["one matching", "all matchings", "certificates"])
@pytest.mark.parametrize("limit", [1, 4])
def test_the_replies_of_a_round_in_which_something_fails_are_not_kept(
    limit: int, failing: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, plain = replies("apart"), Matcher.__call__

    def call(self: Matcher, reference: State, model: State) -> Matching:
        if failing == "one matching" and not torch.equal(model["0.weight"], states[1]["0.weight"]):
            return plain(self, reference, model)
        return fail()

    def fail(*_: object) -> Matching:
        time.sleep(0.02)  # long enough for the other threads to begin
        raise RuntimeError("out of memory") from ValueError("too large")

    monkeypatch.setattr(Matcher, "__call__", call)
    if failing == "certificates":
        monkeypatch.setattr(IdentityCertificate, "holds_each", fail)
    strategy = strategy_around(FedAvg(), reference="global", replies_at_once=limit)
    messages = [answer(message, state) for message, state in zip(configure(strategy, SENT, 3), states, strict=True)]
    kept = [weakref.ref(message) for message in messages]
    gc.disable()  # it frees them in the end, but it may wait for many rounds
    try:
        strategy.aggregate_train(1, messages)
        del messages
        assert [message() for message in kept] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "4"])
def test_a_limit_that_is_no_whole_number_from_1_is_refused(wrong: int) -> None:
    with pytest.raises(UsageError, match="replies_at_once: expected a whole number from 1, or None; got"):
        strategy_around(FedAvg(), replies_at_once=wrong)
