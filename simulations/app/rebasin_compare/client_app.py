"""The client: trains on its own rows, from its own start or the server's model, and answers queries about them."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedrebasin.simulations.attendance import local_epochs, trains_apart
from fedrebasin.simulations.events import emit
from fedrebasin.simulations.handover import take_over
from fedrebasin.simulations.settings import from_run_config
from fedrebasin.simulations.silo import batches_of, initial_model, rows_of_nodes, train_round
from fedrebasin.simulations.training import select_device
from fedrebasin.simulations.trainings import kept_in, train_once
from fedrebasin.simulations.watch import ABOUT
from fedrebasin.strategies import answer_queries

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)  # clients share the cores
    settings = from_run_config(context.run_config)
    node, nodes = (int(str(context.node_config[key])) for key in ("partition-id", "num-partitions"))
    config = message.content.config_records["config"]
    seed, server_round = int(str(config["seed"])), int(str(config["server-round"]))
    strategy = str(config["strategy"])
    progress_file = str(context.run_config["progress-file"])

    data = take_over(settings.data, str(context.run_config["data-file"]))
    rows = rows_of_nodes(settings, data, nodes, seed=seed)[0][node]
    here = {"seed": seed, "server_round": server_round}
    apart = config["start"] != "common" and trains_apart(settings, nodes, node, **here)
    epochs = local_epochs(settings, nodes, node, **here)
    model = initial_model(settings, data, seed=seed, owner=node)
    started = time.perf_counter()

    def report(epoch: int, loss: float) -> None:
        emit(
            progress_file,
            "epoch",
            seed=seed,
            strategy=strategy,
            round=server_round,
            node=node,
            epoch=epoch,
            epochs=epochs,
            loss=loss,
        )

    if not apart:
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    # a client that starts apart has no global model to stay near
    prox = 0.0 if apart else float(str(config.get("proximal-mu", 0.0)))

    def train_here() -> float:
        return train_round(
            *(model, settings, data, rows),
            seed=seed,
            owner=node,
            server_round=server_round,
            epochs=epochs,
            prox=prox,
            progress=report,
        )

    folder = kept_in(str(context.run_config["trainings-folder"]), seed)
    name = f"node{node}-round{server_round}-epochs{epochs}-prox{prox}"
    loss, reused = train_once(folder, name, model, train_here)
    if reused:
        report(epochs, loss)
    seconds = time.perf_counter() - started
    about = ConfigRecord({"node": node, "examples": len(rows), "train-loss": loss, "seconds": seconds})
    about["reused"], about["apart"] = reused, apart
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train-loss": loss, "num-examples": len(rows)}),
            ABOUT: about,
        }
    )
    return Message(content=content, reply_to=message)


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    return Message(RecordDict({ABOUT: ConfigRecord({"node": context.node_config["partition-id"]})}), reply_to=message)


@app.query("rebasin")
def query(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    settings = from_run_config(context.run_config)
    node, nodes = (int(str(context.node_config[key])) for key in ("partition-id", "num-partitions"))
    seed = int(str(message.content.config_records["config"]["seed"]))
    data = take_over(settings.data, str(context.run_config["data-file"]))
    rows, held = (parts[node] for parts in rows_of_nodes(settings, data, nodes, seed=seed))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    answer = answer_queries(
        model=lambda: initial_model(settings, data, seed=seed),
        batches=lambda message, context: batches_of(data, rows[order[: settings.calibration]]),
        held_out=lambda message, context: batches_of(data, held),
        loss=F.cross_entropy,
        device=select_device(settings.device),
    )
    return answer(message, context)
