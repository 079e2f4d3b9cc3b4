"""What a folder of checkpoints must not cost: noise drawn twice, a trunk, another run's rounds, a subclass's state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import MemoryGrid, State, answer, small_net, warnings
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Result, Strategy
from test_strategies_guards import Count
from torch import nn

from fedrebasin.errors import UsageError
from fedrebasin.strategies import FedRebasin, Rebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

INPUTS = (torch.randn(4, 5),)
NOISE = 0.25  # 0.5 times the clipping norm of 1, of two clients


class KilledError(Exception):
    """As a kill: nothing after it runs."""


class Accountant(Count):
    """One that checkpoints keep, as Flower's."""

    def state_dict(self) -> dict[str, object]:
        return {"releases": self.num_releases}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_releases = state["releases"]


def counting() -> Accountant:
    accounting = pytest.importorskip("flwr.supercore.privacy_accounting")
    return Accountant(accounting.SamplingMethod.NO_AMPLIFICATION)


def net() -> nn.Module:
    return small_net(32, norm=False)


def private(folder: Path, released: list[State], *, kill_at: int, step: float, count: Count | None = None) -> Result:
    """Two clients that add ``step`` and twice ``step``; the first to evaluate in round ``kill_at`` is the last."""

    def node(message: Message) -> Message:
        sent = record_to_state(message.content["arrays"])
        place = message.metadata.dst_node_id
        if message.metadata.message_type == "evaluate":
            released.append(sent)
            if message.content["config"]["server-round"] == kill_at:
                raise KilledError
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": 10})}), reply_to=message)
        return answer(message, {name: values + step * place for name, values in sent.items()}, 10, partition_id=place)

    np.random.seed(1)  # as a user's script may
    options = {} if count is None else {"accountant": count}
    inner = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.5, 1.0, 2, **options)  # type: ignore[arg-type]
    strategy = Rebasin(inner, model=net, example_inputs=INPUTS, checkpoint_dir=folder)
    return strategy.start(MemoryGrid({1: node, 2: node}), state_to_record(net().state_dict()), num_rounds=3)


def spread(one: State, other: State) -> float:
    return float(torch.cat([(one[name] - other[name]).flatten() for name in one]).std())


def test_a_round_that_was_killed_in_its_evaluation_is_neither_noised_nor_counted_twice(tmp_path: Path) -> None:
    released: list[State] = []
    count, resumed = counting(), counting()
    with pytest.raises(KilledError):
        private(tmp_path, released, kill_at=2, step=0.001, count=count)
    private(tmp_path, released, kill_at=0, step=0.002, count=resumed)
    one, two, three = released[0], released[2], released[3]  # both nodes evaluate, but in round 2
    assert len(released) == 5 and spread(one, two) > NOISE / 2 and spread(two, three) > NOISE / 2
    assert resumed.num_releases == 3


@pytest.mark.parametrize("lost", ["the newest round", "all saves of round 2"])
def test_noise_that_may_have_gone_out_is_drawn_anew(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    released: list[State] = []
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        if lost != "the newest round":
            save = Path.rename

            def full(path: Path, target: Path) -> Any:
                if target.name == "round-000002":
                    raise OSError(28, "No space left on device")
                return save(path, target)

            patch.setattr(Path, "rename", full)
        private(tmp_path, released, kill_at=2, step=0.001)
    if lost == "the newest round":
        for file in (tmp_path / "round-000002").iterdir():
            file.unlink()
        (tmp_path / "round-000002").rmdir()
    private(tmp_path, released, kill_at=0, step=0.002)
    assert any("its noise is drawn anew" in line for line in warnings)
    assert spread(released[2], released[3]) > NOISE / 2  # both are of round 2


def test_a_run_with_a_trunk_goes_on(tmp_path: Path) -> None:
    grid = MemoryGrid({node: lambda message: answer(message, small_net().state_dict(), 10) for node in (1, 2)})
    for rounds in (0, 1, 2, 3):
        strategy = FedRebasin(
            model=small_net, example_inputs=INPUTS, until="3", checkpoint_dir=tmp_path, fraction_evaluate=0.0
        )
        result = strategy.start(grid, ArrayRecord(small_net().state_dict()), num_rounds=rounds)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3] and "5.weight" not in result.arrays


def test_another_run_on_the_same_folder_is_refused_while_one_is_going(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    refused: list[str] = []

    def start(evaluate: Callable[[int, ArrayRecord], None]) -> None:
        grid = MemoryGrid({node: lambda message: answer(message, net().state_dict(), 10) for node in (1, 2)})
        strategy = FedRebasin(model=net, example_inputs=INPUTS, checkpoint_dir=tmp_path, fraction_evaluate=0.0)
        strategy.start(grid, state_to_record(net().state_dict()), num_rounds=1, evaluate_fn=evaluate)

    def start_another(server_round: int, _: ArrayRecord) -> None:
        if server_round == 1:
            with pytest.raises(
                UsageError, match=r"another run writes to .*; wait for its end, or give a folder"
            ) as error:
                start(lambda *_: None)
            refused.append(str(error.value))

    start(start_another)
    assert len(refused) == 1
    start(lambda *_: None)  # it has ended


def test_a_strategy_around_that_runs_the_rounds_without_checkpoints_is_warned_of(
    tmp_path: Path, warnings: list[str]
) -> None:
    class Outer(Strategy):
        def __init__(self, strategy: Strategy) -> None:
            self.strategy = strategy

        def configure_train(self, *args: Any) -> Any:
            return self.strategy.configure_train(*args)

        def aggregate_train(self, *args: Any) -> Any:
            return self.strategy.aggregate_train(*args)

        def configure_evaluate(self, *args: Any) -> Any:
            return self.strategy.configure_evaluate(*args)

        def aggregate_evaluate(self, *args: Any) -> Any:
            return self.strategy.aggregate_evaluate(*args)

        def summary(self) -> None:
            self.strategy.summary()

    grid = MemoryGrid({node: lambda message: answer(message, net().state_dict(), 10) for node in (1, 2)})
    inside = FedRebasin(model=net, example_inputs=INPUTS, checkpoint_dir=tmp_path, fraction_evaluate=0.0)
    Outer(inside).start(grid, state_to_record(net().state_dict()), num_rounds=2)
    assert list(tmp_path.iterdir()) == []
    assert sum("nothing is kept in" in line and "let this strategy be the outermost" in line for line in warnings) == 1


def test_what_a_derived_class_adds_is_kept_too(tmp_path: Path) -> None:
    class Counting(FedRebasin):
        def __init__(self, label: str) -> None:
            self.rounds = 0
            super().__init__(model=net, example_inputs=INPUTS, checkpoint_dir=tmp_path, fraction_evaluate=0.0)
            self.label, self.best = label, np.zeros(2)

        def aggregate_train(self, *args: Any) -> Any:
            self.rounds += 1
            self.best += 1
            return super().aggregate_train(*args)

    grid = MemoryGrid({node: lambda message: answer(message, net().state_dict(), 10) for node in (1, 2)})
    for rounds, label in ((2, "a"), (3, "b")):
        strategy = Counting(label)
        strategy.start(grid, state_to_record(net().state_dict()), num_rounds=rounds)
        assert (strategy.rounds, strategy.best.tolist(), strategy.label) == (rounds, [rounds, rounds], label)


def test_a_model_that_no_checkpoint_can_hold_is_refused_before_the_first_round(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(5, 4, dtype=torch.complex128), nn.Linear(4, 2, dtype=torch.complex128))
    strategy = FedRebasin(
        model=wide, example_inputs=(torch.randn(4, 5, dtype=torch.complex128),), checkpoint_dir=tmp_path
    )
    with pytest.raises(UsageError, match=r"checkpoint_dir: '0.weight' is complex128, .* complex64, or leave"):
        strategy.start(MemoryGrid({}), state_to_record(wide.state_dict()), num_rounds=1)
