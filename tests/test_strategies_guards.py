"""Under privacy and selection: what is refused, and what auto means there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flower_messages import MemoryGrid, State, play_round, small_net, trained_copy, warnings
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy
from test_strategies_exact import spec_of
from torch import nn

from fedrebasin import check_spec, trace
from fedrebasin.errors import UsageError
from fedrebasin.matching.methods import JOINT_REFERENCES
from fedrebasin.strategies import FedRebasin, Rebasin
from fedrebasin.strategies.records import state_to_record

__all__ = ["warnings"]

INPUTS = (torch.randn(4, 5),)
BATCHES = [torch.randn(200, 5)]


def dp(inner: Strategy) -> Strategy:
    return flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, 2)


class Count:
    """The least that Flower's wrapper asks of an accountant."""

    def __init__(self, sampling_method: Any) -> None:
        self.config = SimpleNamespace(sampling_method=sampling_method, population_size=10, max_epsilon=None)
        self.num_releases = 0

    def compose(self, event: object) -> None:
        self.num_releases += 1

    def get_privacy_spent(self) -> Any:
        return SimpleNamespace(epsilon=1.0, delta=0.1, num_releases=self.num_releases)


def accounted() -> tuple[Rebasin, Count]:
    accounting = pytest.importorskip("flwr.supercore.privacy_accounting")
    count = Count(accounting.SamplingMethod.NO_AMPLIFICATION)
    inner = flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 2, accountant=count)  # type: ignore[arg-type]
    return Rebasin(inner, spec=spec_of()), count


def dp_clients(inner: Strategy) -> Strategy:
    return flower.DifferentialPrivacyClientSideFixedClipping(inner, 0.1, 1.0, 2)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FedAvg, "strategy: expected an instance of flwr.serverapp.strategy.Strategy"),
        (
            dp_clients(FedAvg()),
            "DifferentialPrivacyClientSideFixedClipping has the clients clip before the server aligns",
        ),
        (
            flower.DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.1, 2),
            r"AdaptiveClipping has the clients clip .* align on the client \(rebasin_mod, last in its list of mods\)",
        ),
        (flower.FedXgbBagging(), "FedXgbBagging aggregates trees"),
        (FedRebasin(spec=spec_of()), "strategy: it aligns already"),
        (dp(FedRebasin(spec=spec_of())), "strategy: it aligns already"),
    ],
)
def test_strategies_that_server_side_alignment_does_not_fit_are_refused(strategy: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rebasin(strategy, spec=spec_of())


@pytest.mark.parametrize("inner", [flower.Krum, flower.MultiKrum, flower.Bulyan, lambda: dp(FedAdam())])
@pytest.mark.parametrize("reference", ["largest", *JOINT_REFERENCES])
def test_under_privacy_and_selection_only_the_global_reference_is_built(inner: Any, reference: str) -> None:
    with pytest.raises(UsageError, match=f"reference='{reference}': under .* nothing bounds one client's influence"):
        Rebasin(inner(), spec=spec_of(), reference=reference)


def test_under_privacy_auto_warns_and_repair_is_not_used(warnings: list[str]) -> None:
    strategy = Rebasin(dp(FedAvg()), model=small_net(), example_inputs=INPUTS, calibration=BATCHES)
    assert "DifferentialPrivacyServerSideFixedClipping the reference is the global model" in warnings[0]
    assert strategy.correction == "reset-batchnorm"
    with pytest.raises(UsageError, match=r"correction='repair': under .* past clipping or selection"):
        Rebasin(dp(FedAvg()), model=small_net(), example_inputs=INPUTS, calibration=BATCHES, correction="repair")
    plain = Rebasin(dp(FedAvg()), model=small_net(norm=False), example_inputs=INPUTS, calibration=BATCHES)
    assert plain.correction is None


def test_a_start_of_its_own_is_warned_of(warnings: list[str]) -> None:
    class Saving(FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            return super().start(*args, **kwargs)

    Rebasin(FedAvg(), model=small_net(), example_inputs=INPUTS)
    assert not warnings
    Rebasin(Saving(), model=small_net(), example_inputs=INPUTS)
    assert "Saving.start is not called" in warnings[-1]


def test_a_guard_is_found_under_any_name_that_a_wrapper_gives_it(warnings: list[str]) -> None:
    class Logging(Strategy):
        def __init__(self, inner: Strategy) -> None:
            self.inner = inner

        def configure_train(self, *args: Any) -> Any:
            return self.inner.configure_train(*args)

        def aggregate_train(self, *args: Any) -> Any:
            return self.inner.aggregate_train(*args)

        def configure_evaluate(self, *args: Any) -> Any:
            return self.inner.configure_evaluate(*args)

        def aggregate_evaluate(self, *args: Any) -> Any:
            return self.inner.aggregate_evaluate(*args)

        def summary(self) -> None:
            self.inner.summary()

    strategy = Rebasin(Logging(dp(FedAvg())), model=small_net(norm=False), example_inputs=INPUTS)
    assert strategy.guard == "DifferentialPrivacyServerSideFixedClipping"
    assert any("the reference is the global model" in line for line in warnings)
    sent = small_net(norm=False).state_dict()
    apart = [small_net(norm=False, seed=seed).state_dict() for seed in (1, 2)]
    arrays, _ = play_round(strategy, sent, apart)
    assert arrays is not None and strategy.strategy.inner.current_arrays.keys() == sent.keys()  # it has aggregated


@pytest.mark.parametrize("reference", ["auto", "global"])
def test_an_aggregate_train_that_a_round_apart_passes_by_is_warned_of_before_anything_is_sent(
    reference: str, warnings: list[str]
) -> None:
    class Noisy(FedAvg):
        def aggregate_train(self, *args: Any) -> Any:
            return super().aggregate_train(*args)

    grid = MemoryGrid({1: lambda message: message, 2: lambda message: message})
    initial = state_to_record(small_net().state_dict())
    FedRebasin(spec=spec_of()).start(grid=grid, initial_arrays=initial, num_rounds=0)
    assert not warnings
    Rebasin(Noisy(), spec=spec_of(), reference=reference).start(grid=grid, initial_arrays=initial, num_rounds=0)
    assert sum("does not pass through Noisy.aggregate_train" in line for line in warnings) == (reference == "auto")


def test_under_privacy_no_reply_decides_whether_another_takes_part() -> None:
    sent = small_net().state_dict()
    ordinary = [trained_copy(sent, seed) for seed in range(3)]
    large = {name: 4000 * values if name == "0.weight" else values for name, values in ordinary[2].items()}
    wide = {name: 3e4 * values if name.endswith("running_var") else values for name, values in ordinary[2].items()}
    left_out = []
    for replies in ([*ordinary[:2], large], [ordinary[0], large, large], [*ordinary[:2], wide], [wide, wide, large]):
        _, metrics = play_round(Rebasin(dp(FedAvg()), model=small_net(), example_inputs=INPUTS), sent, replies)
        assert metrics is not None
        left_out.append(metrics["rebasin-left-out"])
    assert left_out == [1, 2, 0, 1]


def test_under_privacy_a_reply_that_is_the_sent_model_costs_itself_and_not_the_run(warnings: list[str]) -> None:
    strategy = Rebasin(dp(FedAvg()), model=small_net(norm=False), example_inputs=INPUTS)
    sent: State = small_net(norm=False).state_dict()
    arrays, metrics = play_round(strategy, sent, [trained_copy(sent, 1), trained_copy(sent, 2), sent])
    assert arrays is not None and metrics is not None and metrics["rebasin-left-out"] == 1
    assert any("node 3 sent the model as it was" in line for line in warnings)


def test_under_an_accountant_an_unequal_number_of_examples_costs_the_round_and_not_the_run(warnings: list[str]) -> None:
    strategy, count = accounted()
    sent: State = small_net().state_dict()
    trained = trained_copy(sent, 1)
    assert play_round(strategy, sent, [trained, trained], [1.0, 2.0]) == (None, None)  # it releases whole rounds alone
    assert any(
        "node 2 sent 2 examples, most nodes 1, and the privacy accountant takes equal" in line for line in warnings
    )
    arrays, _ = play_round(strategy, sent, [trained, trained], [1.0, 1.0])
    assert arrays is not None and count.num_releases == 1


def test_under_an_accountant_a_round_without_replies_is_ended_too() -> None:
    strategy, count = accounted()
    sent: State = small_net().state_dict()
    trained = trained_copy(sent, 1)
    broken = {name: tensor * torch.nan if tensor.is_floating_point() else tensor for name, tensor in sent.items()}
    assert play_round(strategy, sent, [broken, broken], [1.0, 1.0]) == (None, None)
    assert play_round(strategy, sent, [trained, trained], [1.0, 1.0])[0] is not None and count.num_releases == 1


def test_running_statistics_that_nothing_renews_are_warned_of(warnings: list[str]) -> None:
    Rebasin(flower.Krum(), model=small_net(), example_inputs=INPUTS, calibration=BATCHES)
    Rebasin(flower.Krum(), model=small_net(norm=False), example_inputs=INPUTS)
    Rebasin(FedAvg(), model=small_net(), example_inputs=INPUTS)
    assert not any("running statistics" in line for line in warnings)
    Rebasin(flower.Krum(), model=small_net(), example_inputs=INPUTS)
    assert "under Krum no reply reaches running statistics" in warnings[-1]


@pytest.mark.parametrize("tracked", [False, True])
def test_running_statistics_of_a_spec_alone_and_of_instancenorm_are_warned_of(
    tracked: bool, warnings: list[str]
) -> None:
    norm = nn.InstanceNorm1d(6, track_running_stats=tracked)
    net, inputs = nn.Sequential(nn.Conv1d(2, 6, 3), norm, nn.ReLU(), nn.Conv1d(6, 3, 3)), (torch.randn(4, 2, 9),)
    Rebasin(flower.Krum(), model=net, example_inputs=inputs)
    Rebasin(flower.Krum(), spec=check_spec(net, trace(net, inputs), inputs))
    assert sum("no reply reaches running statistics" in line for line in warnings) == 2 * tracked


@pytest.mark.parametrize(
    "wrapper",
    [
        dp,
        dp_clients,
        lambda inner: flower.DifferentialPrivacyServerSideAdaptiveClipping(inner, 0.1, 2),
        lambda inner: flower.DifferentialPrivacyClientSideAdaptiveClipping(inner, 0.1, 2),
    ],
    ids=["fixed", "client-side", "adaptive", "client-side adaptive"],
)
def test_privacy_around_alignment_is_refused_before_anything_is_sent(wrapper: Any) -> None:
    outer = wrapper(FedRebasin(spec=spec_of()))
    grid = MemoryGrid({1: lambda message: message, 2: lambda message: message})
    with pytest.raises(UsageError, match=r"\(Rebasin\(...\)\) clips before alignment; turn them round: Rebasin\(Diff"):
        outer.start(grid=grid, initial_arrays=state_to_record(small_net().state_dict()), num_rounds=1)
