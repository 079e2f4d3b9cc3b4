"""FedRebasin: Rebasin around FedAvg, ready made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedrebasin import PermutationSpec
from fedrebasin.corrections.federated import FederatedOptions
from fedrebasin.strategies.network import Model
from fedrebasin.strategies.options import Correction, CorrectionRounds
from fedrebasin.strategies.rebasin import Rebasin

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]


def _setting(name: str, *, fixed: bool = False) -> Any:
    """A setting of the average inside, to be read here as in FedAvg, and set where it is read when it is used."""

    def read(self: Rebasin) -> Any:
        return getattr(self.strategy, name)

    def write(self: Rebasin, value: Any) -> None:
        setattr(self.strategy, name, value)

    return property(read, None if fixed else write)


class FedRebasin(Rebasin):
    """Federated averaging of aligned models.

    Parameters
    ----------
    model, example_inputs, spec, calibration, reference, matching, correction, federated, select, ...
        As in :class:`Rebasin`.
    fraction_train, fraction_evaluate : float
        Share of the connected nodes that train, and that evaluate.
    min_train_nodes, min_evaluate_nodes, min_available_nodes : int
        With the default of 2, the first round may sample 2 nodes although more are to come: set
        ``min_train_nodes`` and ``min_available_nodes`` to the number that is expected.
    weighted_by_key, arrayrecord_key, configrecord_key : str
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : callable, optional
        As in ``flwr.serverapp.strategy.FedAvg``.

    References
    ----------
    McMahan et al. (AISTATS 2017), "Communication-Efficient Learning of Deep Networks from Decentralized Data";
    Ainsworth, Hayase, Srinivasa (ICLR 2023), "Git Re-Basin".

    Examples
    --------
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> strategy = FedRebasin(model=net, example_inputs=(torch.randn(2, 4),), min_available_nodes=4)
    >>> strategy.min_available_nodes
    4
    """

    fraction_train = _setting("fraction_train")
    fraction_evaluate = _setting("fraction_evaluate")
    min_train_nodes = _setting("min_train_nodes")
    min_evaluate_nodes = _setting("min_evaluate_nodes")
    min_available_nodes = _setting("min_available_nodes")
    configrecord_key = _setting("configrecord_key")
    weighted_by_key = _setting("weighted_by_key", fixed=True)  # the screen of the replies holds it too
    train_metrics_aggr_fn = _setting("train_metrics_aggr_fn")
    evaluate_metrics_aggr_fn = _setting("evaluate_metrics_aggr_fn")

    def __init__(
        self,
        *,
        model: Model | None = None,
        example_inputs: Any = None,
        spec: PermutationSpec | str | Path | None = None,
        calibration: Any = None,
        reference: str = "auto",
        matching: str = "weight",
        correction: Correction = "default",
        correction_rounds: CorrectionRounds = None,
        federated: FederatedOptions | None = None,
        select: str | None = None,
        loss: Callable[..., Any] | None = None,
        beside: Sequence[str] = (),
        send_perms: bool = False,
        home: str = "fixed",
        until: str | None = None,
        node_models: Sequence[Model] = (),
        checkpoint_dir: str | Path | None = None,
        replies_at_once: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsAggregation | None = None,
        evaluate_metrics_aggr_fn: MetricsAggregation | None = None,
    ) -> None:
        average = FedAvg(
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            train_metrics_aggr_fn=train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
        )
        super().__init__(
            average,
            model=model,
            example_inputs=example_inputs,
            spec=spec,
            calibration=calibration,
            reference=reference,
            matching=matching,
            correction=correction,
            correction_rounds=correction_rounds,
            federated=federated,
            select=select,
            loss=loss,
            beside=beside,
            send_perms=send_perms,
            home=home,
            until=until,
            node_models=node_models,
            checkpoint_dir=checkpoint_dir,
            replies_at_once=replies_at_once,
            seed=seed,
            device=device,
        )
