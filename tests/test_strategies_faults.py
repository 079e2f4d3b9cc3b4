"""One faulty client among five on digits: the round's model is as good as the round's without that client."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from flower_messages import State, answer, configure, fail
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg, MultiKrum, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import record_to_state

CLIENTS, TRAINED = 5, 1200
Fault = Callable[[Message, State], list[Message]]


def net(seed: int, width: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@cache
def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]


@cache
def clients(kind: str) -> tuple[State, list[State]]:
    """The sent model, and what each client made of it on its fifth of the data, or of a start of its own."""
    x, y = data()
    start, states = net(0), []
    for client in range(CLIENTS):
        own = copy.deepcopy(start) if kind == "near" else net(1 + client)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(own(x[client:TRAINED:CLIENTS]), y[client:TRAINED:CLIENTS]).backward()
            optimizer.step()
        states.append({name: tensor.detach() for name, tensor in own.state_dict().items()})
    return dict(start.state_dict()), states


def accuracy(record: ArrayRecord) -> float:
    x, y = data()
    model = net(0)
    model.load_state_dict(record_to_state(record))
    with torch.no_grad():
        return float((model(x[TRAINED:]).argmax(1) == y[TRAINED:]).double().mean())


def changed(state: State, name: str, tensor: Tensor) -> State:
    return {**state, name: tensor}


def with_value(value: float) -> Fault:
    def fault(message: Message, state: State) -> list[Message]:
        bias = state["2.bias"].clone()
        bias[3] = value
        return [answer(message, changed(state, "2.bias", bias))]

    return fault


def sends(make: Callable[[State], State | ArrayRecord], examples: float | None = 10) -> Fault:
    return lambda message, state: [answer(message, make(state), examples)]


def of_the_last_round(message: Message, state: State) -> list[Message]:
    late = answer(message, state)
    late.metadata.__dict__["_reply_to_message_id"] = "a message of the round before"
    late.metadata.__dict__["_src_node_id"] = 1  # whose reply to this round is there already
    return [late]


def without_content(message: Message, state: State) -> list[Message]:
    return [Message(RecordDict(), reply_to=message)]


def two_models(message: Message, state: State) -> list[Message]:
    reply = answer(message, state)
    reply.content["one"] = reply.content["two"] = reply.content.pop("arrays")
    return [reply]


FAULTS: dict[str, Fault] = {
    "NaN": with_value(torch.nan),
    "infinity": with_value(-torch.inf),
    "one value of 1e30": with_value(1e30),
    "all weights times 1e30": sends(lambda state: {name: 1e30 * tensor for name, tensor in state.items()}),
    "all weights times 1e6": sends(lambda state: {name: 1e6 * tensor for name, tensor in state.items()}),
    "a key is missing": sends(lambda state: {name: state[name] for name in list(state)[1:]}),
    "other keys": sends(lambda state: {f"module.{name}": tensor for name, tensor in state.items()}),
    "a tensor more": sends(lambda state: changed(state, "3.weight", torch.ones(2))),
    "another shape": sends(lambda state: changed(state, "0.weight", state["0.weight"].T.contiguous())),
    "float64": sends(lambda state: {name: tensor.double() for name, tensor in state.items()}),
    "integers": sends(lambda state: {name: tensor.int() for name, tensor in state.items()}),
    "another architecture": sends(lambda state: dict(net(7, width=40).state_dict())),
    "an empty model": sends(lambda state: ArrayRecord()),
    "nothing": without_content,
    "two ArrayRecords": two_models,
    "no examples": sends(dict, 0),
    "negative examples": sends(dict, -1000),
    "NaN examples": sends(dict, torch.nan),
    "examples are missing": sends(dict, None),
    "a node that died": lambda message, state: [fail(message, "node lost")],
    "no reply in time": lambda message, state: [],
    "a reply to the round before": of_the_last_round,
}


def play(inner: Strategy, kind: str, fault: Fault | None, nodes: int = CLIENTS) -> tuple[ArrayRecord, float]:
    """The model of a round of which the last node is faulty, or is not there; and how many replies were left out."""
    sent, states = clients(kind)
    strategy = Rebasin(inner, model=net(0), example_inputs=(torch.zeros(2, 64),))
    messages = configure(strategy, sent, nodes)
    good = nodes if fault is None else nodes - 1
    replies = [answer(message, state) for message, state in zip(messages[:good], states, strict=False)]
    if fault is not None:
        replies += fault(messages[-1], states[nodes - 1])
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    left_out = metrics["rebasin-left-out"]
    assert isinstance(left_out, int | float)
    return arrays, left_out


@pytest.mark.parametrize("kind", ["near", "apart"])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_faulty_client_of_five_costs_no_point_against_the_round_without_it(fault: str, kind: str) -> None:
    without, _ = play(FedAvg(), kind, None, CLIENTS - 1)
    found, left_out = play(FedAvg(), kind, FAULTS[fault])
    assert left_out == (fault not in ("a node that died", "no reply in time"))
    assert accuracy(without) > 0.8
    assert abs(accuracy(found) - accuracy(without)) <= 0.01


@pytest.mark.parametrize("kind", ["near", "apart"])
def test_of_two_replies_of_one_node_the_first_alone_counts(kind: str) -> None:
    def twice(message: Message, state: State) -> list[Message]:
        return [answer(message, state), answer(message, {name: -tensor for name, tensor in state.items()})]

    once, _ = play(FedAvg(), kind, None)
    found, left_out = play(FedAvg(), kind, twice)
    assert left_out == 1
    assert accuracy(found) == accuracy(once)


def test_finite_harm_of_usual_size_is_for_krum() -> None:
    """A model with its signs turned fits in every way: around FedAvg it counts, MultiKrum takes it for an outlier."""
    harm = sends(lambda state: {name: -tensor for name, tensor in state.items()})
    averaged, left_out = play(FedAvg(), "near", harm)
    assert left_out == 0
    around_krum, _ = play(MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3), "near", harm)
    without, _ = play(MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3), "near", None, CLIENTS - 1)
    assert accuracy(averaged) < accuracy(without)
    assert abs(accuracy(around_krum) - accuracy(without)) <= 0.01
