"""The correction after every aggregation, and the lines of the guide on a grid in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from flower_messages import MemoryGrid, State, answer, play_round, small_net, trained_copy, warnings
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg, FedAvgM
from test_strategies_exact import same_bytes, spec_of
from torch import Tensor, nn
from trained_replies import accuracy, data, fresh, train, trained

from fedrebasin import RebasinError, merge, permute, random_perms, repair, reset_batchnorm, trace, weight_matching
from fedrebasin.strategies import FedRebasin, Rebasin
from fedrebasin.strategies.records import record_to_state

__all__ = ["warnings"]

INPUTS = (torch.randn(4, 5),)
SENT: State = small_net().state_dict()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(100, 5, generator=generator) for _ in range(3)]


class Fragile:
    """Batches that can be read a few times, as at construction, and then hold a NaN."""

    def __init__(self, good_passes: int) -> None:
        self.good_passes = good_passes

    def __iter__(self) -> object:
        self.good_passes -= 1
        return iter(batches() if self.good_passes >= 0 else [torch.full((100, 5), torch.nan)])


def replies(seeds: tuple[int, ...] = (1, 2)) -> list[State]:
    return [permute(spec_of(), random_perms(spec_of(), seed), trained_copy(SENT, seed)) for seed in seeds]


def test_repair_runs_after_the_aggregation_with_the_aligned_replies_as_ends() -> None:
    net = small_net()
    strategy = FedRebasin(model=net, example_inputs=INPUTS, calibration=batches(), reference="global")
    assert strategy.correction == "repair"
    arrays, _ = play_round(strategy, SENT, replies(), examples=[30, 10])
    ends = [permute(strategy.spec, weight_matching(strategy.spec, SENT, state).perms, state) for state in replies()]
    plain, _ = play_round(FedRebasin(spec=spec_of(), reference="global"), SENT, replies(), examples=[30, 10])
    assert plain is not None
    assert arrays is not None
    expected = repair(net, record_to_state(plain), ends, batches(), coefficients=[0.75, 0.25])
    found = record_to_state(arrays)
    assert list(found) == list(SENT)
    for name, tensor in expected.items():
        assert found[name].dtype == SENT[name].dtype
        torch.testing.assert_close(found[name], tensor)
    assert not torch.equal(found["0.weight"], record_to_state(plain)["0.weight"]) or not torch.equal(
        found["1.weight"], record_to_state(plain)["1.weight"]
    )


def test_reset_batchnorm_changes_the_running_statistics_alone() -> None:
    net = small_net()
    strategy = FedRebasin(
        model=net, example_inputs=INPUTS, calibration=batches(), correction="reset-batchnorm", reference="global"
    )
    arrays, _ = play_round(strategy, SENT, replies())
    plain, _ = play_round(FedRebasin(spec=spec_of(), reference="global"), SENT, replies())
    assert arrays is not None
    assert plain is not None
    found, uncorrected = record_to_state(arrays), record_to_state(plain)
    expected = reset_batchnorm(net, uncorrected, batches())
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
        assert torch.equal(found[name], uncorrected[name]) == (name not in ("1.running_mean", "1.running_var"))


def test_under_privacy_the_statistics_come_from_the_calibration_data() -> None:
    net = small_net()
    inner = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 0.5, 2)
    strategy = Rebasin(inner, model=net, example_inputs=INPUTS, calibration=batches())
    arrays, _ = play_round(strategy, SENT, replies())
    assert arrays is not None
    found = record_to_state(arrays)
    expected = reset_batchnorm(net, found, batches())
    torch.testing.assert_close(found["1.running_mean"], expected["1.running_mean"])
    assert not torch.equal(found["1.running_mean"], SENT["1.running_mean"])


def test_a_correction_that_fails_leaves_the_aggregate_and_the_run_goes_on(warnings: list[str]) -> None:
    for passes in range(2, 40):  # fails in the round, not at construction, wherever repair reads
        strategy = FedRebasin(model=small_net(), example_inputs=INPUTS, reference="global", calibration=batches())
        strategy.calibration = Fragile(passes)
        arrays, metrics = play_round(strategy, SENT, replies())
        assert arrays is not None
        assert metrics is not None
        if warnings:
            break
    plain, _ = play_round(FedRebasin(spec=spec_of(), reference="global"), SENT, replies())
    assert len(warnings) == 1
    assert warnings[0].startswith("rebasin: repair failed (CalibrationError: ")
    assert warnings[0].endswith("this round is not corrected")
    assert arrays is not None
    assert plain is not None
    assert same_bytes(arrays, plain)


@pytest.mark.parametrize("select", [None, "calibration"])
def test_a_model_that_repair_cannot_correct_is_not_corrected_by_default(
    select: str | None, warnings: list[str]
) -> None:
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    strategy = FedRebasin(model=net, example_inputs=INPUTS, calibration=batches(), select=select)
    assert strategy.correction is None
    assert [line[:54] for line in warnings] == ["rebasin: the model is not corrected: net: expected a B"]
    with pytest.raises(RebasinError, match="found none"):
        FedRebasin(model=net, example_inputs=INPUTS, calibration=batches(), correction="repair", select=select)


def test_fedavgm_goes_on_from_the_corrected_model() -> None:
    inner = FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
    strategy = Rebasin(inner, model=small_net(), example_inputs=INPUTS, calibration=batches(), reference="global")
    arrays, _ = play_round(strategy, SENT, replies())
    assert arrays is not None
    assert inner.current_arrays is not None
    assert list(inner.current_arrays) == [name for name in SENT if name in strategy.spec.parameters]
    assert all(inner.current_arrays[name].data == arrays[name].data for name in inner.current_arrays)


def test_calibration_batches_may_carry_labels_which_are_not_used() -> None:
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in batches()]
    results = []
    for calibration in (batches(), labelled):
        strategy = FedRebasin(model=small_net(), example_inputs=INPUTS, calibration=calibration, reference="global")
        arrays, _ = play_round(strategy, SENT, replies())
        assert arrays is not None
        results.append(arrays)
    assert same_bytes(*results)


def node(seed: int, own_start: bool) -> object:
    """A client that trains what it receives, or in its first round its own model."""
    rounds = [0]

    def train_or_evaluate(message: Message) -> Message:
        received = record_to_state(message.content.array_records["arrays"])
        net = copy.deepcopy(fresh())
        net.load_state_dict(received)
        if message.metadata.message_type == "evaluate":
            metrics = MetricRecord({"num-examples": 10, "accuracy": accuracy(received)})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        return_state = trained("apart")[seed] if own_start and not rounds[0] else train(net, seed, epochs=1)
        rounds[0] += 1
        return answer(message, return_state, examples=10.0 * (seed + 1), loss=1.0)

    return train_or_evaluate


@pytest.mark.parametrize("inner", ["FedRebasin", "FedAdam"])
def test_the_lines_of_the_guide_run_as_they_stand(inner: str) -> None:
    net, inputs = copy.deepcopy(fresh()), INPUTS
    calibration = [data()[0][:300], data()[0][300:]]
    grid = MemoryGrid({seed + 1: node(seed, own_start=True) for seed in range(3)})  # type: ignore[misc]

    if inner == "FedRebasin":
        strategy: Rebasin = FedRebasin(
            model=net, example_inputs=inputs, calibration=calibration, fraction_train=1.0, min_available_nodes=3
        )
    else:
        strategy = Rebasin(FedAdam(eta=0.01), model=net, example_inputs=inputs)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(net.state_dict()), num_rounds=3)

    assert list(result.arrays) == list(net.state_dict())
    net.load_state_dict(result.arrays.to_torch_state_dict())
    plain = accuracy(merge(trained("apart"), coefficients=[1, 2, 3]))
    assert accuracy(record_to_state(result.arrays)) > plain + 0.1
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
    for server_round, metrics in result.train_metrics_clientapp.items():
        assert (metrics["rebasin-moved-fraction"] > 0) == (server_round == 1)  # type: ignore[operator]
        assert metrics["rebasin-left-out"] == 0
        assert metrics["rebasin-seconds"] > 0  # type: ignore[operator]
        assert metrics["rebasin-objective-gain"] >= 0  # type: ignore[operator]
        assert metrics["loss"] == pytest.approx(1.0)
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}


def test_a_saved_spec_replaces_the_model_where_no_correction_is_asked_for() -> None:
    net = small_net()
    assert FedRebasin(spec=spec_of()).model is None
    assert FedRebasin(model=net, example_inputs=INPUTS).spec.axes == trace(net, INPUTS).axes
