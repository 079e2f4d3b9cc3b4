"""``select="calibration"`` in the strategy: the candidates of a round, what is kept, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flower_messages import State, answer, configure, play_round, small_net, trained_copy, warnings
from flwr.app import ArrayRecord
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as flower
from test_strategies_correction import INPUTS, SENT, batches, replies
from test_strategies_exact import same_bytes, spec_of
from test_strategies_legacy import moved_copies, play
from torch import Tensor

from fedrebasin import moved_fraction, permute, random_perms
from fedrebasin.errors import CalibrationError, UsageError
from fedrebasin.strategies import FedRebasin, Rebasin, perms_from_record
from fedrebasin.strategies.legacy import Rebasin as LegacyRebasin
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]


def outputs(state: State, x: Tensor) -> Tensor:
    net = small_net()
    net.load_state_dict(state)
    with torch.no_grad():
        found: Tensor = net.eval()(x)
    return found


def labelled(state: State) -> list[tuple[Tensor, Tensor]]:
    """Batches whose targets are what ``state`` says."""
    return [(x, outputs(state, x)) for x in batches()]


def selecting(**options: Any) -> FedRebasin:
    options = {"calibration": batches(), "select": "calibration", "reference": "global", **options}
    return FedRebasin(model=small_net(), example_inputs=INPUTS, **options)


def same_function(record: ArrayRecord | None, state: State) -> bool:
    assert record is not None
    x = torch.cat(batches())
    return torch.allclose(outputs(record_to_state(record), x), outputs(state, x), rtol=1e-3, atol=1e-4)


def kept(strategy: Rebasin, metrics: Any) -> str:
    assert strategy._finish.selector is not None
    return strategy._finish.selector.names[int(metrics["rebasin-selected"])]


def test_permuted_replies_are_kept_aligned_byte_for_byte_where_no_correction_is_better() -> None:
    same = trained_copy(SENT, 1)
    states = [permute(spec_of(), random_perms(spec_of(), seed), same) for seed in (1, 2)]
    strategy = selecting()
    arrays, metrics = play_round(strategy, SENT, states)
    plain, _ = play_round(FedRebasin(spec=spec_of(), reference="global"), SENT, states)
    assert arrays is not None and plain is not None and metrics is not None
    assert kept(strategy, metrics) == "aligned"
    assert same_bytes(arrays, plain)
    figures = {name: value for name, value in metrics.items() if name.startswith("rebasin-distance-")}
    assert list(figures) == [
        f"rebasin-distance-{name}" for name in ("plain", "plain+repair", "aligned", "aligned+repair")
    ]
    assert figures["rebasin-distance-plain"] > 100 * figures["rebasin-distance-aligned"]  # type: ignore[operator]
    assert all(isinstance(value, float | int) for value in metrics.values())


def test_the_older_interface_has_the_plain_average_among_its_candidates() -> None:
    options: dict[str, Any] = {"calibration": batches(), "select": "calibration", "reference": "global"}
    strategy = LegacyRebasin(legacy.FedAvg(), model=small_net(), example_inputs=INPUTS, **options)
    _, metrics = play(strategy, SENT, moved_copies(SENT))
    assert metrics["rebasin-distance-plain"] > metrics["rebasin-distance-aligned"]


def test_with_a_loss_a_client_that_is_right_alone_is_kept_in_the_reference_order() -> None:
    states = replies((1, 2, 3))
    wrong = {**states[1], "3.bias": states[1]["3.bias"] + 9}
    states = [states[0], wrong, wrong]
    strategy = selecting(calibration=labelled(states[0]), loss=F.mse_loss)
    arrays, metrics = play_round(strategy, SENT, states)
    assert metrics is not None and arrays is not None
    assert kept(strategy, metrics) == "best-client"
    assert same_function(arrays, states[0])
    assert not torch.equal(record_to_state(arrays)["0.weight"], states[0]["0.weight"])  # it is aligned
    figures = [float(metrics[f"rebasin-loss-{name}"]) for name in ("best-client", "aligned", "plain")]  # type: ignore[arg-type]
    assert figures[0] == min(figures)


@pytest.mark.parametrize(("inner", "plain"), [("FedAvg", True), ("FedProx", True), ("FedAdam", False)])
def test_the_plain_average_is_a_candidate_where_the_inner_strategy_averages(inner: str, plain: bool) -> None:
    options = {"proximal_mu": 0.1} if inner == "FedProx" else {}
    strategy = Rebasin(
        getattr(flower, inner)(**options),
        model=small_net(),
        example_inputs=INPUTS,
        calibration=batches(),
        select="calibration",
        correction=["reset-batchnorm", "repair"],
        reference="global",
    )
    _, metrics = play_round(strategy, SENT, replies())
    assert metrics is not None
    assert ("rebasin-distance-plain+reset-batchnorm" in metrics) == plain
    assert "rebasin-distance-aligned+reset-batchnorm" in metrics


def test_the_plain_candidate_is_what_fedavg_makes_of_the_replies_bit_for_bit() -> None:
    states = replies((1, 2, 3))
    fedavg, _ = play_round(flower.FedAvg(), SENT, states, examples=[30, 10, 20])
    assert fedavg is not None
    average = record_to_state(fedavg)
    counter = "1.num_batches_tracked"
    average[counter] = torch.stack([state[counter] for state in states]).amax()
    strategy = selecting(calibration=labelled(average), loss=F.mse_loss, correction=None)
    arrays, metrics = play_round(strategy, SENT, states, examples=[30, 10, 20])
    assert metrics is not None and arrays is not None
    assert kept(strategy, metrics) == "plain"
    found = record_to_state(arrays)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: one.dtype for name, one in SENT.items()}
    assert all(torch.equal(tensor, average[name]) for name, tensor in found.items())


def test_where_the_plain_average_is_kept_nodes_are_told_that_nothing_moved() -> None:
    states = replies((1, 2, 3))
    fedavg, _ = play_round(flower.FedAvg(), SENT, states, examples=[10, 10, 10])
    assert fedavg is not None
    average = record_to_state(fedavg)
    strategy = selecting(
        calibration=labelled(average), loss=F.mse_loss, correction=None, beside=("copy",), send_perms=True
    )
    answers = []
    for message, state in zip(configure(strategy, SENT, 3), states, strict=True):
        answers.append(answer(message, state))
        answers[-1].content["copy"] = state_to_record({"0.weight": state["0.weight"]})
    arrays, metrics = strategy.aggregate_train(1, answers)
    assert kept(strategy, metrics) == "plain" and arrays is not None
    torch.testing.assert_close(record_to_state(strategy.beside["copy"])["0.weight"], average["0.weight"])
    for message in configure(strategy, record_to_state(arrays), 3, 2):
        perms = perms_from_record(spec_of(), message.content)
        assert perms is not None and moved_fraction(perms) == 0


def test_where_nothing_moves_the_plain_average_is_no_other_candidate() -> None:
    _, metrics = play_round(selecting(), SENT, [trained_copy(SENT, seed) for seed in (1, 2)])
    assert metrics is not None
    assert metrics["rebasin-moved-fraction"] == 0
    assert "rebasin-distance-plain" not in metrics


def test_no_correction_and_no_matching_sees_the_examples_that_are_measured_on() -> None:
    strategy = selecting(matching="activation", calibration=Shuffling())
    selector = strategy._finish.selector
    assert selector is not None
    measured = {float(x) for batch in selector.held_out for x in batch[:, 0]}
    seen = {float(x) for batch in selector.fit for x in batch[:, 0]}
    assert strategy.calibration is selector.fit
    assert strategy._matcher.setting.calibration is selector.fit
    assert (len(measured), len(seen), measured & seen) == (75, 225, set())


class Shuffling:
    """A loader that draws a new order of the same examples each time."""

    def __iter__(self) -> Iterator[Tensor]:
        x = torch.cat(batches())
        return iter(x[torch.randperm(len(x))].split(100))


def test_fedavgm_goes_on_from_the_model_that_is_kept() -> None:
    states = replies()
    inner = flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
    strategy = Rebasin(
        inner,
        model=small_net(),
        example_inputs=INPUTS,
        calibration=labelled(states[0]),
        loss=F.mse_loss,
        select="calibration",
        reference="global",
    )
    arrays, metrics = play_round(strategy, SENT, states)
    assert kept(strategy, metrics) != "aligned"
    assert inner.current_arrays is not None and arrays is not None
    assert all(inner.current_arrays[name].data == arrays[name].data for name in inner.current_arrays)


def test_a_loss_that_fails_leaves_the_aggregate_and_the_run_goes_on(warnings: list[str]) -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("label")

    strategy = selecting(calibration=labelled(SENT), loss=fails)
    arrays, metrics = play_round(strategy, SENT, replies())
    plain, _ = play_round(FedRebasin(spec=spec_of(), reference="global"), SENT, replies())
    assert warnings == ["rebasin: selection failed (KeyError: 'label'); the aggregate stays"]
    assert arrays is not None and plain is not None and metrics is not None
    assert same_bytes(arrays, plain)
    assert "rebasin-selected" not in metrics


def private() -> Any:
    return flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAvg(), 0.0, 0.5, 2)


@pytest.mark.parametrize("inner", [flower.Krum, flower.MultiKrum, flower.Bulyan, private])
def test_under_privacy_and_robust_selection_it_is_refused(inner: Any) -> None:
    with pytest.raises(UsageError, match=r"select='calibration': under .* past clipping or selection; leave select"):
        Rebasin(inner(), model=small_net(), example_inputs=INPUTS, calibration=batches(), select="calibration")


def test_what_it_lacks_is_named_at_construction() -> None:
    with pytest.raises(CalibrationError, match="select='calibration' needs calibration"):
        selecting(calibration=None)
    with pytest.raises(UsageError, match=r"select='calibration' runs the model on calibration data.* give model= too"):
        FedRebasin(spec=spec_of(), calibration=batches(), select="calibration", correction=None)
    with pytest.raises(CalibrationError, match="expected two examples or more, to keep one apart"):
        selecting(calibration=[torch.zeros(1, 5)])
    with pytest.raises(ValueError, match="correction: several need something that chooses among them"):
        selecting(select=None, correction=["repair", "rescale"])
    with pytest.raises(UsageError, match="correction='federated-repair' asks the clients; give select='clients'"):
        selecting(correction=["repair", "federated-repair"])
