"""A strategy of ``flwr.server.strategy`` in the form of the message API's, with names for its arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import FitIns, FitRes, Parameters, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp.strategy import Strategy

from fedrebasin.errors import UsageError
from fedrebasin.strategies.inner import chain, read_attribute
from fedrebasin.strategies.pairs import pairs_of
from fedrebasin.strategies.records import DECODE_ERRORS

Failure = tuple[ClientProxy, FitRes] | BaseException


def to_record(parameters: Parameters, names: Sequence[str]) -> ArrayRecord:
    values = parameters_to_ndarrays(parameters)
    if len(values) != len(names):
        raise UsageError(
            f"parameters: expected the {len(names)} arrays of the model's state_dict, in its order; got {len(values)}: "
            "send [value.numpy() for value in net.state_dict().values()]"
        )
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in zip(names, values, strict=True)})


def _plain(value: Any) -> Any:
    """A truth value or a number of NumPy's as a number of Python's, which a MetricRecord takes alone."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, bool) else value


@dataclass
class Letter:
    """One client's result in the form of a message, as far as a message is read."""

    client: ClientProxy
    result: FitRes
    content: RecordDict
    metadata: SimpleNamespace

    @classmethod
    def of(cls, client: ClientProxy, result: FitRes, names: Sequence[str]) -> Letter:
        """A result whose arrays cannot be named is left as an empty letter, to be left out."""
        content = RecordDict()
        metrics = {key: _plain(value) for key, value in result.metrics.items()}
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        content["metrics"] = MetricRecord({**numbers, "num-examples": _plain(result.num_examples)})
        try:
            content["arrays"] = to_record(result.parameters, names)
        except DECODE_ERRORS:  # UsageError is a ValueError
            content["arrays"] = ArrayRecord()
        node = getattr(client, "node_id", client.cid)
        return cls(client, result, content, SimpleNamespace(src_node_id=node, reply_to_message_id=""))

    def has_error(self) -> bool:
        return False

    def has_content(self) -> bool:
        return True


@dataclass
class NamedStrategy(Strategy):
    """A legacy strategy in the form of the message API's, for arrays with names."""

    strategy: LegacyStrategy
    names: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    clients: ClientManager | None = None
    instructions: list[tuple[ClientProxy, FitIns]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    metrics: dict[str, Scalar] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)

    def summary(self) -> None:
        """The older strategies have none."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        """Keep what the strategy tells the clients; there is no message to return."""
        del config, grid
        assert self.clients is not None
        if not self.trained:
            self.trained = list(arrays)
            self._cut_state()
        parameters = ndarrays_to_parameters([array.numpy() for array in arrays.values()])
        self.instructions = self.strategy.configure_fit(server_round, parameters, self.clients)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate the aligned results."""
        results = []
        for letter in cast("Iterable[Letter]", replies):
            arrays = letter.content.array_records["arrays"]
            letter.result.parameters = ndarrays_to_parameters([arrays[name].numpy() for name in self.trained])
            results.append((letter.client, letter.result))
        parameters, self.metrics = self.strategy.aggregate_fit(server_round, results, self.failures)
        return (None if parameters is None else to_record(parameters, self.trained)), MetricRecord()

    def train_metrics_aggr_fn(self, contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        """The metrics of a round that is merged outside the strategy."""
        del weighted_by_key
        aggregate = read_attribute(self.strategy, "fit_metrics_aggregation_fn", None)
        if aggregate is not None:
            results = {id(letter.content): letter.result for letter in self.letters}
            taking_part = [results[id(content)] for content in contents]
            self.metrics = aggregate([(result.num_examples, result.metrics) for result in taking_part])
        return MetricRecord()

    @property
    def current_arrays(self) -> ArrayRecord:
        """The names of what the strategy steps from; to set it makes another model its current one."""
        return ArrayRecord({name: Array(np.zeros(0)) for name in self.trained})

    @current_arrays.setter
    def current_arrays(self, arrays: ArrayRecord) -> None:
        values = [array.numpy() for array in arrays.values()]
        for link in list(chain(self))[1:]:
            if hasattr(link, "current_weights"):
                link.current_weights = values
            if hasattr(link, "server_opt"):
                link.initial_parameters = ndarrays_to_parameters(values)

    def _cut_state(self) -> None:
        """Leave the strategy the trained arrays of the model that it was made with."""
        keep = [place for place, name in enumerate(self.names) if name in set(self.trained)]
        for link in list(chain(self))[1:]:
            weights, initial = getattr(link, "current_weights", None), getattr(link, "initial_parameters", None)
            if weights is not None and len(weights) == len(self.names):
                link.current_weights = [pairs_of(weights[place]) for place in keep]
            if initial is not None and len(initial.tensors) == len(self.names):
                values = parameters_to_ndarrays(initial)
                link.initial_parameters = ndarrays_to_parameters([pairs_of(values[place]) for place in keep])

    def configure_evaluate(self, *_: Any) -> Iterable[Message]:
        """Never called."""
        raise NotImplementedError

    def aggregate_evaluate(self, *_: Any) -> MetricRecord | None:
        """Never called."""
        raise NotImplementedError
