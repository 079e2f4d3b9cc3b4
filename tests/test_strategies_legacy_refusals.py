"""The older strategies: what they cannot do is refused, with the right way."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flower_messages import small_net
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.server import SimpleClientManager
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as current
from test_strategies_legacy import INPUTS, SENT, play

from fedrebasin import trace
from fedrebasin.errors import UsageError
from fedrebasin.strategies.legacy import Rebasin as LegacyRebasin
from fedrebasin.strategies.legacy_arrays import Letter

SPEC = trace(small_net(), INPUTS)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda: current.FedAvg(), {}, "strategy: expected an instance of flwr.server.strategy.Strategy"),
        (lambda: legacy.QFedAvg(), {}, "QFedAvg of flwr.server.strategy cannot be aligned in front of; take"),
        (lambda: legacy.FedAvg(), {"checkpoint_dir": "runs"}, "checkpoint_dir='runs' needs the message API"),
        (lambda: legacy.FedAvg(), {"select": "clients"}, "select='clients' needs the message API"),
        (
            lambda: legacy.FedAvg(),
            {"select": "calibration", "correction": ["repair", "federated-repair"]},
            r"correction=\['repair', 'federated-repair'\] needs the message",
        ),
        (
            lambda: legacy.FedAvg(),
            {"model": None, "spec": SPEC},
            "model: expected the clients' model, whose state_dict",
        ),
        (
            lambda: legacy.FedAvg(),
            {"correction": "federated-repair"},
            "correction='federated-repair' needs the message",
        ),
        (
            lambda: legacy.DifferentialPrivacyClientSideFixedClipping(legacy.FedAvg(), 1.0, 1.0, 2),
            {},
            "DifferentialPrivacyClientSideFixedClipping has the clients clip before the server aligns",
        ),
        (lambda: legacy.Krum(), {"reference": "merge-many"}, "reference='merge-many': under Krum one client's"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_right_way(
    make: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        LegacyRebasin(make(), **{"model": small_net, "example_inputs": INPUTS, **options})


def test_privacy_around_it_is_refused_in_the_first_round() -> None:
    inner = LegacyRebasin(legacy.FedAvg(), model=small_net, example_inputs=INPUTS)
    with pytest.raises(UsageError, match="turn them round"):
        play(legacy.DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 4), SENT, [SENT] * 4)


def test_parameters_that_are_not_the_state_dict_are_refused() -> None:
    strategy = LegacyRebasin(legacy.FedAvg(), model=small_net, example_inputs=INPUTS)
    with pytest.raises(UsageError, match=r"parameters: expected the 11 arrays of the model's state_dict.*got 2"):
        strategy.configure_fit(1, ndarrays_to_parameters([np.zeros(2), np.zeros(3)]), SimpleClientManager())


def test_a_result_whose_arrays_are_damaged_is_an_empty_letter() -> None:
    header = b"{'descr': '<f4', 'shape': (2,"
    damaged = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    result = FitRes(Status(Code.OK, ""), Parameters([damaged], "numpy.ndarray"), 10, {})
    letter = Letter.of(cast(Any, SimpleNamespace(cid="1")), result, ["weight"])
    assert dict(letter.content.array_records["arrays"]) == {}
