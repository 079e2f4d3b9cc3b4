"""What a strategy remembers between rounds comes back; what cannot is named in the log, once."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import warnings
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg
from torch import nn

from fedrebasin.strategies.restored import restore_strategies
from fedrebasin.strategies.state import decode, encode, remember, strategy_state

__all__ = ["warnings"]


class Sampler:
    """State of a user's own kind; it cannot be kept."""


class Own(FedAvg):
    """With state of kinds that a user's strategy has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()
        self.generator = np.random.default_rng(0)
        self.losses: list[float] = []
        self.score, self.kind, self.nodes = partial(max, 1), Sampler, frozenset({1})  # settings

    def work(self) -> None:
        """As ``aggregate_train`` may: in place, and a new attribute."""
        self.seen.update([7, 8, 7])
        self.generator.random()
        self.losses.append(0.5)
        self.rounds = getattr(self, "rounds", 0) + 1


def resumed(one: Own, before: list[dict[str, Any]], told: set[tuple[int, str]], other: Own | None = None) -> Own:
    arrays: dict[str, np.ndarray] = {}
    facts = strategy_state([one], before, arrays, told)
    other = other or Own()
    restore_strategies([other], json.loads(json.dumps(facts)), arrays)
    return other


def test_state_that_is_changed_in_place_or_set_first_in_a_round_comes_back(warnings: list[str]) -> None:
    one = Own()
    before = remember([one])
    one.work()
    other = resumed(one, before, set())
    assert other.seen == {7: 2, 8: 1} and other.seen[9] == 0
    assert other.losses == [0.5] and other.rounds == 1
    assert other.generator.random(3).tolist() == one.generator.random(3).tolist()
    assert warnings == []


def test_records_of_flowers_come_back_as_what_they_were() -> None:
    one, arrays = Own(), ArrayRecord({"w": Array(np.ones(2))})
    one.last = RecordDict({"a": arrays, "m": MetricRecord({"x": 1.0, "y": [2, 3]}), "c": ConfigRecord({"t": "z"})})  # type: ignore[attr-defined]
    found = resumed(one, remember([one]), set()).last  # type: ignore[attr-defined]
    assert type(found) is RecordDict and dict(found) == dict(one.last)  # type: ignore[attr-defined]
    assert [type(record) for record in found.values()] == [ArrayRecord, MetricRecord, ConfigRecord]


class Torch(Own):
    """With a server optimizer of torch's, an average of weights, and a tensor that may go anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.tensor(2.0))]
        self.optimizer = torch.optim.Adam(self.params)
        self.average = {"w": torch.zeros(2, 3)}

    def work(self) -> None:
        for param in self.params:
            param.grad = param.detach() ** 2
        self.optimizer.step()
        self.average["w"] = 0.9 * self.average["w"] + self.params[0].detach()
        self.phase = torch.tensor([1 + 2j]).conj()


def test_tensors_come_back_where_an_optimizer_holds_them() -> None:
    one = Torch()
    before = remember([one])
    one.work()
    other = resumed(one, before, set(), Torch())
    assert isinstance(other, Torch)
    assert other.phase.tolist() == [1 - 2j] and isinstance(other.params[0], nn.Parameter)
    for each in (one, other):
        each.work()
    for found, expected in ((other.params, one.params), (other.average.values(), one.average.values())):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_generators_go_on_where_they_were(name: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    generator = np.random.Generator(getattr(np.random, name)(3))
    generator.integers(9, size=5, dtype=np.int32)
    found = decode(json.loads(json.dumps(encode({"a": [generator]}, "here", arrays))), arrays)["a"][0]
    assert found.normal(size=4).tolist() == generator.normal(size=4).tolist()


@pytest.mark.parametrize(
    "value",
    [
        Sampler(),
        {(1, 2): 3},
        {1, 2},
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, device="meta"),
        torch.Generator(),
        np.array(["a"]),
        [object()],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_change_and_cannot_be_kept_is_named_once(value: Any, warnings: list[str]) -> None:
    one, told = Own(), set[tuple[int, str]]()
    one.extra = value  # type: ignore[attr-defined]
    for _ in range(2):
        resumed(one, remember([one]), told)
    assert len(warnings) == 1 and "rebasin: Own.extra is not kept in the checkpoint: " in warnings[0]


def test_an_object_that_is_made_later_does_not_become_its_state(warnings: list[str]) -> None:
    class Moments:
        def state_dict(self) -> dict[str, float]:
            return {"mean": 1.0}

        def load_state_dict(self, state: dict[str, float]) -> None:
            raise NotImplementedError

    one = Own()
    one.moments = Moments()  # type: ignore[attr-defined]
    assert not hasattr(resumed(one, remember([one]), set()), "moments")
    assert "Own.moments is not there to take up its state; make it where the strategy is made" in warnings[0]


def test_flowers_own_strategies_hold_nothing_that_is_lost(warnings: list[str]) -> None:
    links = [FedAdam(), FedAvg()]
    strategy_state(links, remember(links), {}, set())
    assert warnings == []


def test_lists_that_a_run_has_not_changed_come_from_the_users_code_and_others_from_the_run() -> None:
    old, new = Own(), Own()
    old.rates, old.seen = [0.1, {"warm": 2}], [1]  # type: ignore[attr-defined]
    new.rates, new.seen = [0.5, {"warm": 3}], [0]  # type: ignore[attr-defined]
    arrays: dict[str, np.ndarray] = {}
    before = remember([old])
    old.seen.append(2)  # type: ignore[attr-defined]
    facts = json.loads(json.dumps(strategy_state([old], before, arrays, set())))
    restore_strategies([new], facts, arrays)
    assert new.rates == [0.5, {"warm": 3}] and new.seen == [1, 2]  # type: ignore[attr-defined]
