"""Rebasin for Flower's older strategies (``flwr.server.strategy``, ``aggregate_fit``): the same code behind them.

Those strategies send lists of arrays without names, in the order of the model's ``state_dict``. ``legacy_arrays.py``
gives them the names, so that the strategy of the message API (``rebasin.py``) does all the work.
"""

from __future__ import annotations

from logging import WARNING
from typing import Any, cast

from flwr.app import ConfigRecord, Message
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
)
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import (
    DPFedAvgAdaptive,
    DPFedAvgFixed,
    FedAvgAndroid,
    FedXgbBagging,
    FedXgbCyclic,
    FedXgbNnAvg,
    QFedAvg,
)
from flwr.server.strategy import Strategy as LegacyStrategy
from torch import nn

from fedrebasin.errors import UsageError
from fedrebasin.strategies import rebasin
from fedrebasin.strategies.inner import chain, read_attribute
from fedrebasin.strategies.legacy_arrays import Failure, Letter, NamedStrategy, to_record
from fedrebasin.strategies.metrics import wrong_count
from fedrebasin.strategies.pairs import from_pairs

_REFUSED = (DPFedAvgAdaptive, DPFedAvgFixed, FedAvgAndroid, FedXgbBagging, FedXgbCyclic, FedXgbNnAvg, QFedAvg)
#: what is in the values that need what this interface has not: a message to clients, the number of rounds
_NOT_HERE = {"correction": "federated", "select": "clients", "correction_rounds": "last"}


class Rebasin(LegacyStrategy):
    """Align the clients' hidden units before another strategy of ``flwr.server.strategy`` aggregates them.

    Parameters
    ----------
    strategy : flwr.server.strategy.Strategy
        FedAvg and its kin, Krum, Bulyan, or a server-side privacy wrapper around one.
    model : nn.Module or function of no arguments
        The clients' model; its ``state_dict`` gives the order of the arrays.
    **options
        As for :class:`fedrebasin.strategies.Rebasin`; no ``checkpoint_dir``, ``beside``, ``send_perms``, ``until``,
        ``node_models``, and neither a correction nor ``select="clients"`` by queries, for which this interface has no
        message, nor ``correction_rounds="last"``, since it tells no strategy how many rounds there are.

    Raises
    ------
    UsageError
        At construction, for a strategy or an option that does not fit; in the first round, for parameters that are
        not the model's ``state_dict`` values.

    Examples
    --------
    >>> import torch
    >>> from flwr.server.strategy import FedAvg
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> Rebasin(FedAvg(), model=net, example_inputs=(torch.randn(2, 4),))
    Rebasin(FedAvg(accept_failures=True))
    """

    def __init__(self, strategy: LegacyStrategy, *, model: Any, **options: Any) -> None:
        if not isinstance(strategy, LegacyStrategy):
            raise UsageError(
                f"strategy: expected an instance of flwr.server.strategy.Strategy; got {strategy!r}; for the message "
                "API use fedrebasin.strategies.Rebasin"
            )
        for link in chain(strategy):
            if isinstance(link, _REFUSED):
                raise UsageError(
                    f"strategy: {type(link).__name__} of flwr.server.strategy cannot be aligned in front of; take "
                    "fedrebasin.strategies.Rebasin and a strategy of flwr.serverapp.strategy"
                )
        if model is None:
            raise UsageError("model: expected the clients' model, whose state_dict names the arrays; got None")
        for name in (*_NOT_HERE, "checkpoint_dir", "beside", "send_perms", "until", "node_models"):
            value = options.get(name)
            if value and _NOT_HERE.get(name, "") in str(value):
                raise UsageError(
                    f"{name}={value!r} needs the message API: fedrebasin.strategies.Rebasin around a strategy of "
                    "flwr.serverapp.strategy"
                )
        self.strategy = strategy
        self._inner = NamedStrategy(strategy)
        self._rebasin = rebasin.Rebasin(self._inner, model=model, **options)
        self._inner.names = list(cast(nn.Module, self._rebasin.model).state_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strategy!r})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Let the strategy give the first model."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Let the strategy sample clients; it sees the trained arrays alone, the clients get all."""
        names = self._inner.names
        self._inner.clients = client_manager
        sent = to_record(parameters, names)
        list(self._rebasin.configure_train(server_round, sent, ConfigRecord(), cast(Any, client_manager)))
        whole: dict[int, Parameters] = {}  # clients share what they are sent
        for _, instructions in self._inner.instructions:
            part = instructions.parameters
            if id(part) not in whole:
                own = from_pairs(to_record(part, self._inner.trained), sent)
                whole[id(part)] = ndarrays_to_parameters([own.get(name, sent[name]).numpy() for name in names])
        return [(client, FitIns(whole[id(one.parameters)], one.config)) for client, one in self._inner.instructions]

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list[Failure]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Align the results, let the strategy aggregate them, correct the model."""
        if failures and not read_attribute(self.strategy, "accept_failures", True):
            return None, {}
        self._inner.failures, self._inner.metrics = failures, {}
        letters = [Letter.of(client, result, self._inner.names) for client, result in results]
        self._inner.letters = letters
        arrays, metrics = self._rebasin.aggregate_train(server_round, cast("list[Message]", letters))
        self._inner.letters = []
        found = dict(self._inner.metrics)
        found.update({name: cast(Scalar, value) for name, value in (metrics or {}).items()})
        if arrays is None:
            return None, found
        return ndarrays_to_parameters([array.numpy() for array in arrays.values()]), found

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Let the strategy configure the evaluation of the whole model."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Let the strategy aggregate the evaluation, without results that have no weight."""
        kept = []
        for client, result in results:
            if wrong := wrong_count("num_examples", result.num_examples):
                where = f"client {client.cid} sent {wrong}"
                log(WARNING, "rebasin: %s; left out of the evaluation of round %d", where, server_round)
            else:
                kept.append((client, result))
        return self.strategy.aggregate_evaluate(server_round, kept, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Let the strategy evaluate the whole model."""
        return self.strategy.evaluate(server_round, parameters)
