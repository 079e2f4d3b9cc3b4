"""Clients with data of their own that answer queries by the real handler, and a round of a strategy with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from flower_messages import MemoryGrid, Node, State, answer, fail, small_net, trained_copy
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedrebasin import check_spec, permute, random_perms, trace, weight_matching
from fedrebasin.corrections.federated import Case, FederatedOptions, correct_federated
from fedrebasin.strategies import FedRebasin, Privacy, Rebasin, answer_queries
from fedrebasin.strategies.queries import bytes_of
from fedrebasin.strategies.records import record_to_state, state_to_record
from fedrebasin.yardsticks import Loss

INPUTS = (torch.randn(4, 5, dtype=torch.float64),)
EXAMPLES = [30.0, 10.0, 20.0]


def net() -> nn.Module:
    return small_net().double()


SENT: State = net().state_dict()
SPEC = check_spec(net(), trace(net(), INPUTS), INPUTS)
GIVEN: dict[str, Any] = {"model": net, "example_inputs": INPUTS, "spec": SPEC}


def data(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = seed + torch.randn(120, 5, generator=generator, dtype=torch.float64)
    return list(zip(x.split(60), torch.arange(120).remainder(3).split(60), strict=True))


def end(seed: int) -> State:
    return permute(SPEC, random_perms(SPEC, seed), trained_copy(SENT, seed))


def client(
    seed: int,
    change: Callable[[Message, Message], Message] | None = None,
    *,
    privacy: Privacy | None = None,
    scale: float = 1.0,
    held_out: list[Any] | None = None,
    loss: Loss | None = None,
) -> Node:
    """A ClientApp that trains (returns its end) and answers queries; ``change`` spoils what it answers."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, end(seed), EXAMPLES[seed])

    batches = [(scale * x, y) for x, y in data(seed)]
    given: dict[str, Any] = {"privacy": privacy, "loss": loss}
    if held_out is not None:
        given["held_out"] = lambda message, context: held_out
    app.query("rebasin")(answer_queries(model=net, batches=lambda message, context: batches, **given))
    context = Context(run_id=1, node_id=seed + 1, node_config={}, state=RecordDict(), run_config={})

    def node(message: Message) -> Message:
        try:
            reply = app(message, context)
        except ValueError as error:  # what Flower's runtime makes of it
            return fail(message, str(error))
        return change(message, reply) if change and message.metadata.message_type != "train" else reply

    return node


class Spy(MemoryGrid):
    """Counts the queries and may lose replies; remembers the timeouts."""

    def __init__(self, nodes: dict[int, Node], lost: tuple[int, ...] = ()) -> None:
        super().__init__(nodes)
        self.lost, self.queries, self.bytes, self.timeouts = lost, [], 0, set[float | None]()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        if sent and sent[0].metadata.message_type == "query.rebasin":
            self.queries.append([message.metadata.dst_node_id for message in sent])
            self.timeouts.add(timeout)
            replies = [reply for reply in replies if reply.metadata.src_node_id not in self.lost]
            self.bytes += sum(bytes_of(message) for message in [*sent, *replies])
        return replies


def play(
    correction: Any,
    nodes: dict[int, Node] | None = None,
    *,
    strategy: Rebasin | None = None,
    lost: tuple[int, ...] = (),
    **options: Any,
) -> tuple[State, MetricRecord, Spy]:
    """One round; node i + 1 is client i."""
    grid = Spy(nodes or {place + 1: client(place) for place in range(3)}, lost)
    if strategy is None:
        strategy = FedRebasin(
            model=net,
            example_inputs=INPUTS,
            correction=correction,
            reference="global",
            fraction_evaluate=0.0,
            **options,
        )
    result = strategy.start(grid, state_to_record(SENT), num_rounds=1, timeout=7.0)
    return record_to_state(result.arrays), result.train_metrics_clientapp[1], grid


@lru_cache
def uncorrected() -> State:
    """The merged model of a round without a correction."""
    return play(None)[0]


def plain(places: tuple[int, ...] = (0, 1, 2)) -> tuple[State, list[State], list[float]]:
    """The uncorrected model, the aligned ends of some of the nodes, their shares."""
    merged = uncorrected()
    ends = [end(place) for place in range(3)]
    aligned = [permute(SPEC, weight_matching(SPEC, SENT, one).perms, one) for one in ends]
    return merged, [aligned[place] for place in places], [EXAMPLES[place] for place in places]


def expected(correction: str, places: tuple[int, ...] = (0, 1, 2), **options: Any) -> State:
    merged, ends, shares = plain(places)
    case = Case(net(), merged, ends, shares, INPUTS, FederatedOptions(**options))
    return correct_federated(correction, case, [data(place) for place in places])


def same(found: State, wanted: State, tolerance: float = 1e-9) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == SENT[name].dtype
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)
