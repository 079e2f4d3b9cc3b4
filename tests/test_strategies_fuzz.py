"""Replies of any kind: no exception leaves a round, and the global model stays finite and in shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flower_messages import State, answer, configure, fail, small_net, trained_copy
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    QFedAvg,
    Strategy,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_strategies_exact import rebasin

from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import state_to_record

NODES = 4
SENT: State = small_net().state_dict()
NAMES = list(SENT)
INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.9, server_momentum=0.5),
    "FedAdam": FedAdam,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "privacy": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, NODES),
}

numbers = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e19, 2e19, 1e30, -3e38, 1e300, 5.0, -1.0])
dtypes = st.sampled_from(["float32", "float16", "float64", "int64", "uint8", "bool", "complex64", "<U3", "S2", ">f4"])
shapes = st.lists(st.integers(0, 13), max_size=3).map(tuple)


@st.composite
def arrays_of(draw: st.DrawFn) -> ArrayRecord:
    """A trained model with up to three things wrong with it, or nothing."""
    record = state_to_record(trained_copy(SENT, draw(st.integers(0, 3))))
    whole = dict(record)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(NAMES))
        fault = draw(st.integers(0, 8))
        if name not in record:
            continue
        values = np.array(whole[name].numpy())
        if fault == 0:
            del record[name]
        elif fault == 1:
            record[draw(st.text(max_size=5))] = record.pop(name)
        elif fault == 2:
            values = values.astype("float64").reshape(-1) if values.dtype.kind not in "fiub" else values.reshape(-1)
            if values.size:
                with np.errstate(all="ignore"):
                    values[draw(st.integers(0, values.size - 1))] = draw(
                        numbers if values.dtype.kind == "f" else st.integers(-(2**62), 2**62)
                    )
            record[name] = Array(values.reshape(whole[name].shape))
        elif fault == 3:
            with np.errstate(all="ignore"):
                record[name] = Array(np.asarray(values * np.asarray(draw(numbers)).astype(values.dtype)))
        elif fault == 4:
            record[name] = Array(np.zeros(draw(shapes), dtype=draw(dtypes)))
        elif fault == 5:
            record[name] = Array(np.asarray(values.astype(draw(dtypes))))
        elif fault == 6:
            declared = tuple(record[name].shape) if draw(st.booleans()) else draw(shapes)
            record[name] = Array(
                draw(dtypes), declared, draw(st.sampled_from(["numpy.ndarray", "other"])), draw(st.binary(max_size=200))
            )
        elif fault == 7:
            data = record[name].data
            record[name] = Array(
                record[name].dtype, record[name].shape, record[name].stype, data[: draw(st.integers(0, len(data)))]
            )
        else:
            record.clear()
    return record


examples = st.one_of(
    st.integers(-2, 50),
    st.sampled_from([np.nan, np.inf, 0.5, 1e308, float(2**53), float(2**60), 5e-324]),
    st.lists(st.integers(0, 3), max_size=2),
)


@st.composite
def reply(draw: st.DrawFn) -> Callable[[Message], Message | None]:
    """What a node makes of its message: mostly an answer, sometimes an error or nothing."""
    kind = draw(st.integers(0, 9))
    arrays, count, extra = draw(arrays_of()), draw(st.none() | examples), draw(st.integers(0, 5))
    partition = draw(st.none() | st.integers(0, 3) | numbers | st.lists(st.floats(), max_size=2))
    loss = draw(st.none() | numbers.filter(lambda value: abs(value) < 1e20))

    def respond(message: Message) -> Message | None:
        if kind == 0:
            return fail(message)
        if kind == 1:
            return None
        more: dict[str, Any] = {} if partition is None else {"partition_id": partition}
        found = answer(
            message, arrays, count if kind > 3 else 10, **more, **({} if loss is None else {"train_loss": loss})
        )
        content = found.content
        if extra == 1:
            content["more"] = MetricRecord({"num-examples": 3})
        elif extra == 2:
            content["more"] = ArrayRecord({"x": Array(np.zeros(2))})
        elif extra == 3:
            content["more"] = ConfigRecord({"x": "y"})
        elif extra == 4 and kind == 4:
            del content["arrays"]
        elif extra == 5 and kind == 4:
            del content["metrics"]
        return found

    return respond


@cache
def strategy_of(inner: str) -> Rebasin:
    return rebasin(INNER[inner]())


def check(inner: str, respond: list[Callable[[Message], Message | None]], repeat: bool) -> None:
    """Play one round, with a good reply in the last place."""
    strategy = strategy_of(inner)
    messages = configure(strategy, SENT, NODES)
    replies = [found for message, one in zip(messages, respond, strict=False) if (found := one(message)) is not None]
    replies.append(answer(messages[-1], trained_copy(SENT, 9), 7, train_loss=0.5))
    if repeat:
        replies.append(answer(messages[-1], trained_copy(SENT, 8), 7, train_loss=0.5))
    # QFedAvg collects garbage for every reply, which takes a quarter of a second in this process
    with np.errstate(all="ignore"), mock.patch("gc.collect"):
        model, metrics = strategy.aggregate_train(1, replies)
    if inner == "privacy" and model is None:  # Flower's wrapper drops a round with failures
        return
    assert model is not None and metrics is not None
    assert list(model) == NAMES
    for name, tensor in SENT.items():
        values = model[name].numpy()
        assert values.shape == tuple(tensor.shape) and values.dtype == tensor.numpy().dtype, name
        assert np.isfinite(values).all(), name


rounds = given(
    inner=st.sampled_from(list(INNER)), respond=st.lists(reply(), min_size=3, max_size=3), repeat=st.booleans()
)
quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=quiet)
@rounds
def test_no_reply_ends_a_round_or_reaches_the_model(inner: str, respond: list[Any], repeat: bool) -> None:
    check(inner, respond, repeat)


@pytest.mark.slow
@settings(max_examples=3400, deadline=None, derandomize=True, suppress_health_check=quiet)
@rounds
def test_no_reply_of_ten_thousand_ends_a_round(inner: str, respond: list[Any], repeat: bool) -> None:
    check(inner, respond, repeat)
