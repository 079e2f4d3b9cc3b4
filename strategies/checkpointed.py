"""A run that is written down after every round, and goes on from there when it is started again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedrebasin.errors import UsageError, first_line
from fedrebasin.strategies.arrays import missing_and_extra
from fedrebasin.strategies.beside import Beside
from fedrebasin.strategies.checkpoint import (
    Checkpoint,
    check_storable,
    load_checkpoint,
    save_checkpoint,
)
from fedrebasin.strategies.inner import is_private
from fedrebasin.strategies.noise import draw_anew, is_kept, keep_noise
from fedrebasin.strategies.part import Trunk
from fedrebasin.strategies.records import is_finite
from fedrebasin.strategies.restored import check_moments, restore_strategies
from fedrebasin.strategies.state import (
    decode,
    encode,
    links_with_state,
    random_state,
    remember,
    restore_random,
    strategy_state,
)
from fedrebasin.strategies.widths import Widths

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_HISTORIES = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")


class Checkpointed(Strategy):
    """Stand around a strategy for one run: count its rounds on, keep its metrics, save after each round.

    Flower has no start round and always counts from 1; the strategy, its clients and ``evaluate_fn`` are given the
    true number, on which FedAdam's bias correction and a client's random seed may depend.

    Parameters
    ----------
    strategy : Strategy
        Rebasin around another.
    kept : mapping of str to Beside or Widths
        What it remembers itself, by name.
    folder : Path
    trunk : Trunk
        What of the model travels.

    Notes
    -----
    A resumed run ends with the same bits as one that was never interrupted if its clients depend on nothing but the
    message and the round's number, all nodes are sampled, and replies come in one order (``partition-id``, see
    :class:`Rebasin`). Under differential privacy the round is saved before its model goes out to be evaluated, so that
    neither its noise is drawn nor its release composed a second time (``noise.py``).
    """

    def __init__(self, strategy: Strategy, kept: Mapping[str, Beside | Widths], folder: Path, trunk: Trunk) -> None:
        self.strategy = strategy
        self.kept = kept
        self.folder = folder
        self.trunk = trunk
        self._private = is_private(strategy)
        self._links = links_with_state(strategy)
        self._before = remember(self._links)
        self._told: set[tuple[int, str]] = set()
        self._done = 0
        self._metrics: dict[str, dict[int, MetricRecord]] = {name: {} for name in _HISTORIES}
        self._aggregated = False

    def summary(self) -> None:
        """Log the folder, then the strategy's settings."""
        log(INFO, "\t├──> Checkpoints after every round: %s", self.folder)
        self.strategy.summary()

    def run(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        timeout: float,
        train_config: ConfigRecord | None,
        evaluate_config: ConfigRecord | None,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        """Run what is left of ``num_rounds``; return the result of all of them.

        Raises
        ------
        UsageError
            If the folder holds a checkpoint that cannot be read or is of another model or other strategies.
        """
        check_storable(initial_arrays)
        found = load_checkpoint(self.folder)
        if found is not None:
            self._check(found, initial_arrays)
            self._done = found.round
            log(INFO, "rebasin: round %d of %s; the rounds below count on from it", found.round, self.folder)

        def after_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            if number == 0 and found is not None:
                self._restore(found)
                return None
            number += self._done
            metrics = None if evaluate_fn is None else evaluate_fn(number, arrays)
            if metrics is not None:
                self._metrics["evaluate_metrics_serverapp"][number] = metrics
            self._save(number, arrays)
            return metrics

        left = max(0, num_rounds - self._done)
        arrays = initial_arrays if found is None else found.model
        result = super().start(grid, arrays, left, timeout, train_config, evaluate_config, after_round)
        for name in _HISTORIES:
            setattr(result, name, self._metrics[name])
        if not result.arrays and self._aggregated:
            result.arrays = arrays
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy configure the true round."""
        return self.strategy.configure_train(server_round + self._done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate; keep the metrics."""
        arrays, metrics = self.strategy.aggregate_train(server_round + self._done, replies)
        self._aggregated |= arrays is not None
        if metrics is not None:
            self._metrics["train_metrics_clientapp"][server_round + self._done] = metrics
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy configure the evaluation of the true round."""
        messages = self.strategy.configure_evaluate(server_round + self._done, arrays, config, grid)
        if not self._private:
            return messages
        messages = list(messages)
        if messages:
            self._save(server_round + self._done, arrays)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the strategy aggregate the evaluation; keep the metrics."""
        metrics = self.strategy.aggregate_evaluate(server_round + self._done, replies)
        if metrics is not None:
            self._metrics["evaluate_metrics_clientapp"][server_round + self._done] = metrics
        return metrics

    def _check(self, found: Checkpoint, initial: ArrayRecord) -> None:
        if found.model.keys() != initial.keys():  # from the first round on a trunk alone is aggregated
            initial = self.trunk.cut(initial)
        wrong = missing_and_extra(found.model, initial) if found.model.keys() != initial.keys() else ""
        for name in [] if wrong else initial:
            kept, here = found.model[name], initial[name]
            if not wrong and (tuple(kept.shape), kept.dtype) != (tuple(here.shape), here.dtype):
                wrong = f"{name!r} as {tuple(kept.shape)} {kept.dtype}, not {tuple(here.shape)} {here.dtype}"
        if wrong:
            raise UsageError(
                f"checkpoint_dir: the model in {str(self.folder)!r} is not that of initial_arrays: it has {wrong}; "
                "give a folder of its own to each model"
            )
        if not is_finite(found.model, initial):
            raise UsageError(
                f"checkpoint_dir: the model of round {found.round} in {str(self.folder)!r} holds a NaN or an infinity; "
                "remove that folder to go on from the round before"
            )

    def _save(self, number: int, model: ArrayRecord) -> None:
        arrays: dict[str, np.ndarray] = {}
        facts: dict[str, Any] = {
            "metrics": {
                name: [[key, dict(record)] for key, record in kept.items()] for name, kept in self._metrics.items()
            },
            "aggregated": self._aggregated,
            **{name: encode(one.state_dict(), name, arrays) for name, one in self.kept.items()},
            "strategies": strategy_state(self._links, self._before, arrays, self._told),
            "random": random_state(arrays),
        }
        kept: int | None = number
        try:
            save_checkpoint(self.folder, Checkpoint(number, model, arrays, facts))
        except OSError as error:
            kept = None
            log(WARNING, "rebasin: round %d is not kept in %s (%s)", number, self.folder, first_line(error))
        if self._private:
            keep_noise(self.folder, kept)

    def _restore(self, found: Checkpoint) -> None:
        """Take up state, metrics and random numbers."""
        try:
            restore_strategies(self._links, found.facts["strategies"], found.arrays)
            check_moments(self._links, found.model)
            for name, one in self.kept.items():
                one.load_state_dict(decode(found.facts[name], found.arrays))
            for name in _HISTORIES:
                kept = found.facts["metrics"][name]
                self._metrics[name] = {int(number): MetricRecord(record) for number, record in kept}
            self._aggregated = bool(found.facts["aggregated"])
            restore_random(found.facts["random"], found.arrays)
            if self._private and not is_kept(self.folder, found.round):
                draw_anew(self.folder, found.round)
        except UsageError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise UsageError(
                f"checkpoint_dir: round {found.round} in {str(self.folder)!r} holds no state of a run "
                f"({first_line(error)}); remove that folder to go on from the round before"
            ) from error
