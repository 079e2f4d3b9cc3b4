"""Complex weights and buffers: matched by all of their numbers, averaged, corrected or refused in one sentence."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flower_messages import play_round
from flwr.serverapp.strategy import FedAvg
from networks_spectral import Complex, FourierOperator
from safetensors.torch import save_file
from torch import Tensor, nn

from fedrebasin import (
    InvalidSpecError,
    PermutationSpec,
    RebasinError,
    check_spec,
    distill,
    frank_wolfe_matching,
    identity_perms,
    interpolate,
    least_squares,
    match_each,
    match_many,
    match_widths,
    merge,
    permute,
    random_perms,
    regmean,
    repair,
    sinkhorn_matching,
    straight_through_matching,
    trace,
    weight_matching,
    zip_trunks,
)
from fedrebasin.simulations.merge_average import averaged
from fedrebasin.stored import StoredState
from fedrebasin.strategies import FedRebasin
from fedrebasin.strategies.buffers import average_states
from fedrebasin.strategies.records import record_to_state

INPUTS = (torch.zeros(2, 2, 8),)
State = dict[str, Tensor]


@cache
def spec_of() -> PermutationSpec:
    return check_spec(FourierOperator(), trace(FourierOperator(), INPUTS), INPUTS)


def weights(seed: int) -> State:
    torch.manual_seed(seed)
    return FourierOperator().state_dict()


def same(first: State, second: State) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("method", [weight_matching, frank_wolfe_matching, sinkhorn_matching])
def test_planted_permutations_are_found_where_imaginary_parts_alone_tell_units_apart(method: Any) -> None:
    net = Complex()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(1j * parameter.imag)
    inputs = (torch.zeros(3, 4, dtype=torch.cfloat),)
    spec, state = trace(net, inputs), net.state_dict()
    moved = permute(spec, random_perms(spec, 1), state)
    assert same(permute(spec, method(spec, state, moved).perms, moved), state)


def test_the_objective_is_the_real_part_of_the_hermitian_product() -> None:
    spec, first, second = spec_of(), weights(0), weights(1)
    tied = {axis.name for axes in spec.tied.values() for axis in axes}
    expected = sum(float((first[name] * second[name].conj()).real.sum()) for name in tied)
    matching = weight_matching(spec, first, second)
    assert matching.objective_before == pytest.approx(expected, rel=1e-5)
    distance = sum(float((first[name] - second[name]).abs().square().sum()) for name in tied)
    moved = permute(spec, matching.perms, second)
    nearer = sum(float((first[name] - moved[name]).abs().square().sum()) for name in tied)
    assert distance - nearer == pytest.approx(2 * (matching.objective - expected), rel=1e-4)


def test_many_models_are_matched_by_complex_weights() -> None:
    spec, state = spec_of(), weights(0)
    models = [permute(spec, random_perms(spec, seed), state) for seed in (1, 2)]
    for matching, model in zip(match_each(spec, state, models), models, strict=True):
        assert same(permute(spec, matching.perms, model), state)
    found = match_many(spec, [state, *models])
    first, *others = (permute(spec, perms, model) for perms, model in zip(found.perms, [state, *models], strict=True))
    assert all(same(first, other) for other in others)


def test_a_model_near_its_reference_stays_where_it_is_by_all_of_its_numbers() -> None:
    spec, state = spec_of(), weights(0)
    near = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in state.items()}
    (matching,) = match_each(spec, state, [near])
    assert matching.moved_fraction == 0
    turned = {name: tensor.conj().resolve_conj() if tensor.is_complex() else tensor for name, tensor in state.items()}
    assert weight_matching(spec, state, turned).objective_before < weight_matching(spec, state, state).objective_before


def test_a_spec_that_ties_a_complex_axis_wrongly_is_refused() -> None:
    net, spec = FourierOperator(), spec_of()
    axes = {**spec.axes, "spectral.0.weight": tuple(reversed(spec.axes["spectral.0.weight"][:2]))}
    axes["spectral.0.weight"] += spec.axes["spectral.0.weight"][2:]
    with pytest.raises(InvalidSpecError, match="change"):
        check_spec(net, PermutationSpec(axes, buffers=spec.buffers), INPUTS)


def test_complex_weights_are_averaged() -> None:
    first, second = weights(0), weights(1)
    merged = merge([first, second], coefficients=[1, 3])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
        assert tensor.dtype == first[name].dtype
    assert same(interpolate(first, second, 0.0), first) and same(interpolate(first, second, 1.0), second)


def test_files_are_matched_and_averaged_as_state_dicts_are(tmp_path: Path) -> None:
    spec, states = spec_of(), [weights(0), weights(1)]
    for place, state in enumerate(states):
        save_file(state, tmp_path / f"{place}.safetensors")
    stored = [StoredState(tmp_path / f"{place}.safetensors") for place in (0, 1)]
    matching = weight_matching(spec, *stored)
    assert all(torch.equal(matching.perms[name], own) for name, own in weight_matching(spec, *states).perms.items())
    perms = [identity_perms(spec), matching.perms]
    expected = merge([permute(spec, own, state) for own, state in zip(perms, states, strict=True)])
    assert same(dict(averaged(spec, stored, perms, [0.5, 0.5])), expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.bool, torch.float8_e4m3fn])
def test_the_strategys_average_takes_every_kind_of_number(dtype: torch.dtype) -> None:
    states = [{"table": torch.ones(2).to(dtype)}, {"table": torch.zeros(2).to(dtype)}]
    expected = 1.0 if not (dtype.is_floating_point or dtype.is_complex) else 0.25
    found = average_states(states, [0.25, 0.75])["table"]
    assert found.dtype == dtype and bool((found.to(torch.complex64) == expected).all())


def test_the_strategy_aligns_replies_with_complex_weights_and_is_fedavg_where_nothing_moves() -> None:
    spec, sent = spec_of(), weights(0)
    states = [{name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in sent.items()} for _ in range(3)]
    expected, _ = play_round(FedAvg(), sent, states)
    shuffled = [permute(spec, random_perms(spec, seed), state) for seed, state in enumerate(states)]
    for replies in (states, shuffled):
        found, metrics = play_round(
            FedRebasin(model=FourierOperator(), example_inputs=INPUTS, reference="global"), sent, replies
        )
        assert found is not None and expected is not None and metrics is not None
        assert metrics["rebasin-left-out"] == 0
        assert same(record_to_state(found), record_to_state(expected))


class Rotated(nn.Module):
    """A table of complex numbers, as rotary embeddings keep, is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("turns", torch.polar(torch.ones(2), torch.arange(2.0)))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_real(torch.view_as_complex(x.unflatten(1, (2, 2))) * self.turns).flatten(1)
        found: Tensor = self.last(F.relu(self.norm(self.first(turned))))
        return found


def test_a_complex_table_costs_no_round() -> None:
    inputs = (torch.zeros(3, 4),)
    torch.manual_seed(0)
    states = [Rotated().state_dict() for _ in range(3)]
    strategy = FedRebasin(model=Rotated(), example_inputs=inputs, calibration=[torch.randn(32, 4)] * 2)
    found, metrics = play_round(strategy, states[0], states)
    assert found is not None and metrics is not None
    assert metrics["rebasin-moved-fraction"] > 0  # type: ignore[operator]
    torch.testing.assert_close(record_to_state(found)["turns"], states[0]["turns"])


@pytest.mark.parametrize("correct", [repair, least_squares, regmean])
def test_corrections_leave_complex_layers_averaged(correct: Any) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8, dtype=torch.cfloat)
            self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.third(F.relu(self.second(self.first(x.to(torch.cfloat)).abs())))
            return found

    torch.manual_seed(0)
    ends = [Mixed().state_dict() for _ in range(2)]
    merged = merge(ends)
    found = correct(Mixed(), merged, ends, [torch.randn(64, 4)])
    assert torch.equal(found["first.weight"], merged["first.weight"])
    assert not torch.equal(found["second.bias"], merged["second.bias"])


def test_distillation_trains_complex_weights() -> None:
    net = FourierOperator()

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.net(x).squeeze(1)
            return found

    ends = [{f"net.{name}": tensor for name, tensor in weights(seed).items()} for seed in (0, 1)]
    found = distill(Classes(), merge(ends), ends, [torch.randn(16, 2, 8)], epochs=1)
    assert not torch.equal(found["net.spectral.0.weight"], merge(ends)["net.spectral.0.weight"])


def test_what_cannot_be_done_with_complex_weights_is_said_in_one_sentence() -> None:
    spec, first, second = spec_of(), weights(0), weights(1)
    batches = [(torch.randn(2, 2, 8), torch.randn(2, 1, 8))]
    with pytest.raises(RebasinError, match=r"net: expected real weights .*'spectral.0.weight' is complex; use weight_"):
        straight_through_matching(spec, FourierOperator(), first, second, batches, loss=F.mse_loss)
    with pytest.raises(RebasinError, match="reference: expected real weights where widths change"):
        match_widths(spec, spec, first, second)
    with pytest.raises(RebasinError, match=r"models\[0\]: expected real weights where units are zipped"):
        zip_trunks([spec, spec], FourierOperator(), [first, second], [batches[0][0]], until="local.0")
