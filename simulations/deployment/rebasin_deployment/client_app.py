"""The silo's side: no torch, no fedrebasin."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .training import train

app = ClientApp()


@app.train()
def train_silo(message: Message, context: Context) -> Message:
    """Train on the silo's own digits; ``partition-id`` lets the server sum the replies in one order."""
    partition, partitions = (int(str(context.node_config[key])) for key in ("partition-id", "num-partitions"))
    sent = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
    server_round = int(str(message.content.config_records["config"]["server-round"]))
    weights, examples = train(sent, partition, partitions, server_round)
    arrays = ArrayRecord({name: Array(value) for name, value in weights.items()})
    metrics = MetricRecord({"num-examples": examples, "partition-id": partition})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
