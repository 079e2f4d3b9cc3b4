"""What surrounds a correction changes nothing in it: modes, default devices, and networks that write into inputs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corrections_ends import State, draw, random_ends
from torch import Tensor, nn

import fedrebasin
from fedrebasin import (
    RebasinError,
    activation_matching,
    merge,
    merge_modules,
    select_candidate,
    split_calibration,
    trace,
)
from fedrebasin.corrections.federated import FEDERATED, correct_federated
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, correct
from fedrebasin.corrections.queries import Case
from fedrebasin.diagnostics import layer_similarity

WITH_NORMS = [name for name in CORRECTIONS if name != "bias-normalisation"]
WITHOUT_NORMS = [name for name in CORRECTIONS if name != "reset-batchnorm"]


class Normalising(nn.Module):
    """Normalises its inputs, in place if it is told to."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(1.0).div_(2.0) if self.in_place else (x - 1.0) / 2.0
        logits: Tensor = self.last(self.second(self.first(x).relu()).relu())
        return logits


def layers_and_norms() -> nn.Sequential:
    """Layers whose outputs are written over before a norm, or the caller, reads them."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv1d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm1d(8)),
        *(nn.Conv1d(8, 8, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 8), nn.Flatten()),
        *(nn.Linear(32, 10), nn.ReLU(inplace=True), nn.Linear(10, 4)),
    ).double()


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def corrected(name: str, net: nn.Module, ends: list[State], data: list[Tensor]) -> State:
    return correct(name, CorrectionSetting(net, data, [0.3, 0.7]), merge(ends, coefficients=[0.3, 0.7]), ends)


def same(found: State, expected: State) -> bool:
    return all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", WITHOUT_NORMS)
def test_a_network_that_writes_into_its_inputs_is_corrected_like_one_that_does_not(name: str) -> None:
    nets = [Normalising(in_place=in_place).double() for in_place in (True, False)]
    ends, data = random_ends(nets[0]), [draw(60, 5), draw(50, 5, seed=1)]
    given = [batch.clone() for batch in data]
    assert same(corrected(name, nets[0], ends, given), corrected(name, nets[1], ends, data))
    assert all(torch.equal(one, other) for one, other in zip(given, data, strict=True))


def test_a_network_that_writes_into_its_inputs_is_proved_and_merged() -> None:
    nets, data = [Normalising(in_place=True) for _ in range(2)], [draw(120, 5).float()]
    example = data[0][:4].clone()
    given = example.clone()
    merged = merge_modules(nets, (given,), calibration=data)
    assert torch.equal(given, example) and merged(given.clone()).shape == (4, 3)


@pytest.mark.parametrize("what", ["matching", "similarity"])
def test_a_network_that_writes_into_its_inputs_is_compared_like_one_that_does_not(what: str) -> None:
    found, (one, other) = [], random_ends(Normalising(in_place=True).double())
    for in_place in (True, False):
        net, data = Normalising(in_place=in_place).double(), [draw(60, 5)]
        spec = trace(net, (draw(2, 5),))
        if what == "matching":
            found.append(activation_matching(spec, net, one, other, data).objective)
        else:
            found.append(layer_similarity(spec, net, one, other, data))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", WITH_NORMS)
def test_inference_mode_changes_no_result(name: str) -> None:
    net, data = layers_and_norms(), [draw(60, 3, 8), draw(50, 3, 8, seed=1)]
    ends = random_ends(net, data)
    expected = corrected(name, net, ends, data)
    with torch.inference_mode():
        own = [batch.clone() for batch in data], [{key: x.clone() for key, x in end.items()} for end in ends]
        found = corrected(name, net, own[1], own[0])
    assert same(found, expected)
    assert same(corrected(name, net, own[1], own[0]), expected)  # what was made in that mode may be used outside


@pytest.mark.parametrize("name", FEDERATED)
def test_inference_mode_changes_nothing_that_nodes_answer(name: str) -> None:
    net, data = layers_and_norms(), [draw(120, 3, 8), draw(110, 3, 8, seed=1)]
    ends = random_ends(net, data)
    case = Case(net, merge(ends), ends, [0.5, 0.5], data[0][:2])
    expected = correct_federated(name, case, [[one] for one in data])
    with torch.inference_mode():
        assert same(correct_federated(name, case, [[one] for one in data]), expected)


@pytest.mark.parametrize("name", WITHOUT_NORMS)
def test_the_default_device_is_not_used(name: str) -> None:
    net, data = plain(), [draw(60, 5).float(), draw(50, 5, seed=1).float()]
    ends = random_ends(net)
    expected = corrected(name, net, ends, data)
    with torch.device("meta"):
        assert same(corrected(name, net, ends, data), expected)


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_the_default_device_is_not_used_to_part_data_and_to_choose(loss: Any) -> None:
    net = plain()
    data, ends = [(draw(60, 5).float(), torch.arange(60) % 3)], random_ends(net)

    def choose() -> dict[str, float]:
        _, held_out = split_calibration(net, data)
        return select_candidate(net, {"a": ends[0]}, held_out, ends=ends, alone={"b": ends[1]}, loss=loss).figures

    expected = choose()
    with torch.device("meta"):
        assert choose() == expected


@pytest.mark.parametrize("name", ["least-squares", "least-squares-probabilities", "regmean", "best-end"])
def test_sums_that_half_precision_cannot_hold_are_solved_for_as_in_single(name: str) -> None:
    net, data = plain(), [20 * draw(300, 5).half()]
    ends = random_ends(net)
    narrow = [{key: x.half() for key, x in end.items()} for end in ends]
    found = corrected(name, plain().half(), narrow, data)
    expected = corrected(name, net, [{key: x.float() for key, x in end.items()} for end in narrow], [data[0].float()])
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float16
        torch.testing.assert_close(found[key].float(), tensor, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "name", ["repair", "rescale", "reshift", "closed_form", "least_squares", "regmean", "distill", "best_end"]
)
def test_a_warning_of_few_examples_names_the_callers_line(name: str) -> None:
    net = plain()
    ends = random_ends(net)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        getattr(fedrebasin, name)(net, merge(ends), ends, [draw(50, 5).float()])
    assert found and {warning.filename for warning in found} == {__file__}


class Decides(nn.Module):
    """Returns classes, and no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).relu()).argmax(1)


@pytest.mark.parametrize("name", ["distill", "best-end", "best-end-probabilities", "least-squares-probabilities"])
def test_a_network_that_returns_no_floating_tensor_is_refused_where_its_outputs_are_needed(name: str) -> None:
    with pytest.raises(RebasinError, match=r"needs .*no floating (output|tensor)"):
        corrected(name, Decides(), random_ends(Decides()), [draw(100, 5).float()])


class Encoder(nn.Module):
    """A transformer that torch computes by one fused function where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.layer(x).mean(1))
        return logits


@pytest.mark.parametrize("name", ["best-end", "best-end-probabilities", "least-squares-probabilities"])
def test_an_encoder_ends_in_its_last_layer_though_torch_rounds_otherwise_unseen(name: str) -> None:
    data = [draw(60, 7, 16).float(), draw(50, 7, 16, seed=1).float()]
    torch.manual_seed(0)
    ends = [Encoder().state_dict() for _ in range(2)]
    assert not same(corrected(name, Encoder(), ends, data), merge(ends, coefficients=[0.3, 0.7]))
