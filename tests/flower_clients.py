"""A client app outside a run: the context, the message and the reply of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flower_messages import State, outside_a_run
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedrebasin.strategies.records import record_to_state, state_to_record

Reply = Callable[[Message], Message]


def context() -> Context:
    """What Flower hands to a client app."""
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def train_message(sent: State | ArrayRecord, kind: str = "train", **config: Any) -> Message:
    """A message of the message API to node 1."""
    outside_a_run()
    record = sent if isinstance(sent, ArrayRecord) else state_to_record(sent)
    content = RecordDict({"arrays": record, "config": ConfigRecord(config)})
    return Message(content, dst_node_id=1, message_type=kind)


def app_that_sends(trained: State, *, empties: bool = False, beside: dict[str, State] | None = None) -> Reply:
    """A train function whose result is known; ``empties`` takes the received arrays away, as to save memory."""

    def train(message: Message) -> Message:
        if empties:
            message.content.array_records["arrays"].clear()
        content = RecordDict({"arrays": state_to_record(trained), "metrics": MetricRecord({"num-examples": 10})})
        for name, state in (beside or {}).items():
            content[name] = state_to_record(state)
        return Message(content, reply_to=message)

    return train


def call(train: Reply, message: Message, mods: Sequence[Any], ctxt: Context | None = None) -> Message:
    """What a ClientApp answers that has the mods on its train function."""
    app = ClientApp()
    calls = {"train": app.train, "evaluate": app.evaluate, "query": app.query}
    calls[message.metadata.message_type](mods=list(mods))(lambda msg, _: train(msg))
    return app(message, ctxt or context())


def arrays_of(reply: Message) -> dict[str, Tensor]:
    """The model in a reply that is no error."""
    assert not reply.has_error(), reply.error.reason
    return record_to_state(reply.content.array_records["arrays"])
