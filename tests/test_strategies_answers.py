"""The client's handler, and federated corrections that are refused at construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from federated_clients import INPUTS, SENT, net
from flower_messages import outside_a_run, warnings
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedrebasin.corrections.federated import FEDERATED
from fedrebasin.errors import RebasinError, UsageError
from fedrebasin.strategies import FederatedOptions, FedRebasin, Rebasin, answer_queries
from fedrebasin.strategies.queries import bytes_of, read_query
from fedrebasin.strategies.records import state_to_record

__all__ = ["warnings"]


@pytest.mark.parametrize("correction", FEDERATED)
def test_under_privacy_and_selection_unaccounted_queries_are_refused(correction: str) -> None:
    private = flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 2)
    for inner in (private, flower.Krum()):
        with pytest.raises(UsageError, match=f"correction='{correction}': under .* outside the privacy accounting"):
            Rebasin(inner, model=net, example_inputs=INPUTS, correction=correction)


def test_a_network_without_anything_to_correct_is_refused_at_construction() -> None:
    linear = nn.Linear(5, 3).double()
    with pytest.raises(RebasinError, match="net: expected a BatchNorm, another norm with weight and bias, or a hidden"):
        FedRebasin(model=linear, example_inputs=INPUTS, correction="federated-repair")
    with pytest.raises(RebasinError, match="label_prior: expected a network whose last linear layer gives the logits"):
        FedRebasin(
            model=nn.Sequential(nn.Linear(5, 3), nn.Softmax(1)).double(),
            example_inputs=INPUTS,
            correction="federated-least-squares",
            federated=FederatedOptions(label_prior=True),
        )


def test_the_handler_refuses_what_it_cannot_answer_and_says_why(warnings: list[str]) -> None:
    handler = answer_queries(model=net, batches=lambda message, context: [])
    outside_a_run()
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    message = Message(RecordDict(), dst_node_id=1, message_type="query.rebasin")
    with pytest.raises(RebasinError, match="message: expected a query of fedrebasin; got records \\[\\]"):
        read_query(message)
    reply = handler(message, context)
    assert "message: expected a query of fedrebasin" in str(reply.content["refusal"]["reason"])
    message = Message(
        RecordDict({"query": ConfigRecord({"kind": "grams", "limit": 9}), "end": state_to_record(SENT)}),
        dst_node_id=1,
        message_type="query.rebasin",
    )
    reply = handler(message, context)
    assert reply.content["refusal"]["reason"] == "CalibrationError: calibration: expected at least one batch; got none"
    assert len(warnings) == 2
    for bad in ({"model": 3, "batches": handler}, {"model": net, "batches": [1]}):
        with pytest.raises(UsageError, match=r"(model|batches): expected .*; got (int|list)"):
            answer_queries(**bad)  # type: ignore[arg-type]


def test_float32_models_travel_as_they_are() -> None:
    record = state_to_record({"a": torch.ones(3)})
    message = Message(
        RecordDict({"query": ConfigRecord({"kind": "grams", "limit": 9}), "end": record}),
        dst_node_id=1,
        message_type="query.rebasin",
    )
    asked = read_query(message)
    assert (asked.kind, asked.about, asked.merged) == ("grams", {"limit": 9}, {})
    assert asked.end["a"].dtype == torch.float32
    assert bytes_of(message) == len(record["a"].data) > np.zeros(3, np.float32).nbytes
