"""Flower's legacy message flow in memory: NumPy clients behind mods, and a whole SecAgg+ round on a grid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flower_messages import MemoryGrid, State, outside_a_run
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import (
    arrayrecord_to_parameters,
    fitins_to_recorddict,
    parameters_to_arrayrecord,
    recorddict_to_fitres,
)
from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

Arrays = list[np.ndarray]
Fit = Callable[[Arrays], Arrays]


class Client(NumPyClient):
    """A client whose training is a function of the received arrays; each counts as many examples as its node's id."""

    def __init__(self, fit: Fit, examples: int) -> None:
        self.train, self.examples = fit, examples

    def fit(self, parameters: Arrays, config: Mapping[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
        return self.train(parameters), self.examples, {}

    def evaluate(self, parameters: Arrays, config: Mapping[str, Any]) -> tuple[float, int, dict[str, Any]]:
        return float(parameters[0].sum()), self.examples, {}


def listed(state: State) -> Arrays:
    """A model as the legacy API sends it: its arrays, without names."""
    return [tensor.numpy() for tensor in state.values()]


def app_of(fit: Fit, mods: Sequence[Any], examples: int = 10) -> ClientApp:
    """The client app around one client."""

    def client_fn(context: Context) -> Any:
        return Client(fit, examples).to_client()

    return ClientApp(client_fn=client_fn, mods=list(mods))


def context_of(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def fit_message(sent: Arrays, node: int = 1, **config: Any) -> Message:
    """What the server sends outside secure aggregation."""
    outside_a_run()
    content = fitins_to_recorddict(FitIns(ndarrays_to_parameters(sent), config), keep_input=True)
    return Message(content, dst_node_id=node, message_type="train")


def fit_once(app: ClientApp, sent: Arrays, **config: Any) -> Arrays:
    """One fit message, and the arrays that come back."""
    reply = app(fit_message(sent, **config), context_of(1))
    return parameters_to_ndarrays(recorddict_to_fitres(reply.content, keep_input=True).parameters)


class SecureRound:
    """Nodes, and the SecAgg+ workflow that asks them; every message that reaches the server is kept."""

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
        self.received: list[Message] = []
        contexts = {node: context_of(node) for node in apps}

        def node_of(node: int) -> Callable[[Message], Message]:
            def answer(message: Message) -> Message:
                TaskIdentity.node_id = node  # of whom the reply says that it comes
                try:
                    reply = apps[node](copy.deepcopy(message), contexts[node])  # on a wire nothing is shared
                except Exception as error:  # noqa: BLE001 - as Flower does with a client that raises
                    reply = Message(Error(code=2, reason=str(error)), reply_to=message)
                finally:
                    TaskIdentity.node_id = 1
                self.received.append(reply)
                return reply

            return answer

        self.grid = MemoryGrid({node: node_of(node) for node in apps})

    def run(self, sent: Arrays) -> Arrays:
        """The server's model after one round; what it was, if the round came to nothing."""
        manager = SimpleClientManager()
        for node in self.grid.nodes:
            manager.register(GridClientProxy(node_id=node, grid=self.grid, run_id=1))
        nodes = len(self.grid.nodes)
        strategy = FedAvg(min_fit_clients=nodes, min_available_clients=nodes)
        context = LegacyContext(context_of(0), ServerConfig(num_rounds=1), strategy, manager)
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
        context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(
            ndarrays_to_parameters(sent), keep_input=True
        )
        SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.5, max_weight=40.0)(self.grid, context)
        record = context.state.array_records[MAIN_PARAMS_RECORD]
        return parameters_to_ndarrays(arrayrecord_to_parameters(record, keep_input=True))
