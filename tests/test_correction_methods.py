"""Corrections by name: each is its function, in the core, in a strategy and in merge_modules."""

from __future__ import annotations

import inspect
import re
import warnings as python_warnings
from collections.abc import Iterator

import pytest
import torch
from corrections_ends import random_ends
from flower_messages import play_round, small_net, trained_copy, warnings
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from test_strategies_exact import same_bytes
from torch import nn

import fedrebasin
from fedrebasin import CalibrationError, RebasinError, merge, merge_modules
from fedrebasin.corrections.methods import CORRECTIONS, PATIENT_EPOCHS, CorrectionSetting, correct
from fedrebasin.errors import UsageError
from fedrebasin.strategies import FedRebasin, Rebasin
from fedrebasin.strategies.options import VALUES

__all__ = ["warnings"]

DATA = [torch.randn(100, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


#: without ends, or functions with other arguments (tests of their own)
NOT_FUNCTIONS = (
    "reset-batchnorm",
    "least-squares-probabilities",
    "least-squares+distill",
    "patient-distill",
    "best-end-probabilities",
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name not in NOT_FUNCTIONS])
def test_a_name_is_its_function_with_the_coefficients(name: str) -> None:
    net, shares = network(), [0.2, 0.8]
    ends = random_ends(net)
    merged = merge(ends, coefficients=shares)
    function = getattr(fedrebasin, name.replace("-", "_"))
    expected = function(net, merged, ends, DATA if CORRECTIONS[name].inputs else DATA[0], coefficients=shares)
    found = correct(name, CorrectionSetting(net, DATA, shares), merged, ends)
    assert all(torch.equal(found[key], expected[key]) for key in merged)
    assert any(not torch.equal(found[key], merged[key]) for key in merged)
    parameters = list(inspect.signature(function).parameters)
    assert parameters[:3] == ["net", "merged", "ends"] and {"coefficients", "device"} < set(parameters)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_an_end_whose_coefficient_is_zero_takes_no_part_whatever_it_holds(name: str) -> None:
    net = small_net(norm=name != "bias-normalisation")
    ends = random_ends(net, DATA)
    spoiled = {key: tensor * torch.nan for key, tensor in ends[0].items()}
    setting = {"net": net, "calibration": DATA}
    expected = correct(name, CorrectionSetting(**setting, coefficients=[0.2, 0.8]), merge(ends), ends)
    found = correct(name, CorrectionSetting(**setting, coefficients=[0.2, 0.8, 0]), merge(ends), [*ends, spoiled])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_strategy_takes_every_name_and_corrects_its_aggregate(name: str, warnings: list[str]) -> None:
    needs_no_norm = name == "bias-normalisation"
    net = small_net(norm=not needs_no_norm)
    sent = net.state_dict()
    replies = [trained_copy(sent, seed) for seed in (1, 2)]
    given = {"model": net, "example_inputs": (torch.randn(4, 5),), "reference": "global"}
    data = {} if needs_no_norm else {"calibration": DATA}
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error")
        arrays, _ = play_round(FedRebasin(**given, **data, correction=name), sent, replies)
    plain, _ = play_round(FedRebasin(**given, correction=None), sent, replies)
    assert arrays is not None and plain is not None
    assert warnings == [] and not same_bytes(arrays, plain)
    assert name in VALUES["correction"]


def test_a_strategy_reads_calibration_data_anew_in_every_epoch_of_patient_distillation() -> None:
    class Counted:
        read = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.read += 1
            return iter(DATA)

    net, data = small_net(), Counted()
    given = {"model": net, "example_inputs": (torch.randn(4, 5),), "reference": "global"}
    strategy = FedRebasin(**given, calibration=data, correction="patient-distill")
    data.read = 0
    sent = net.state_dict()
    play_round(strategy, sent, [trained_copy(sent, seed) for seed in (1, 2)])
    assert data.read > PATIENT_EPOCHS


@pytest.mark.parametrize("name", [name for name, method in CORRECTIONS.items() if method.ends])
def test_under_privacy_what_looks_at_the_raw_replies_is_refused(name: str) -> None:
    inner = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 0.5, 2)
    with pytest.raises(
        UsageError, match=f"correction='{re.escape(name)}': under .* it would bring in the clients' raw models"
    ):
        Rebasin(inner, model=small_net(), example_inputs=(DATA[0],), calibration=DATA, correction=name)


def test_merge_modules_takes_a_name() -> None:
    nets = [network(seed) for seed in range(2)]
    solved, averaged, scaled = (
        merge_modules(nets, (DATA[0],), calibration=data, correction=name).state_dict()
        for name, data in (("least-squares", DATA), (None, DATA), ("bias-normalisation", None))
    )
    assert not torch.equal(solved["2.weight"], averaged["2.weight"])
    assert not torch.equal(scaled["2.bias"], averaged["2.bias"])
    with pytest.raises(RebasinError, match=r"correction: expected None or one of repair, .*; got 'magic'"):
        merge_modules(nets, (DATA[0],), correction="magic")
    with pytest.raises(CalibrationError, match="correction='least-squares' needs calibration, a collection of input"):
        merge_modules(nets, (DATA[0],), correction="least-squares")


def test_what_a_name_lacks_is_refused() -> None:
    net = network()
    state = net.state_dict()
    with pytest.raises(RebasinError, match=r"correction: expected one of repair, .*; got 'magic'"):
        correct("magic", CorrectionSetting(net, DATA), state, [state])
    with pytest.raises(CalibrationError, match="correction='regmean' needs calibration"):
        correct("regmean", CorrectionSetting(net), state, [state])
    with pytest.raises(RebasinError, match="correction='bias-normalisation' needs example_inputs"):
        correct("bias-normalisation", CorrectionSetting(net), state, [state])
