"""A strategy around another one: it runs the rounds, with checkpoints if asked, and leaves evaluation to it."""

from __future__ import annotations

from collections.abc import Iterable
from logging import INFO
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedrebasin import PermutationSpec
from fedrebasin.strategies.account import Account
from fedrebasin.strategies.beside import Beside
from fedrebasin.strategies.checkpoint import hold_folder
from fedrebasin.strategies.checkpointed import Checkpointed, EvaluateFn
from fedrebasin.strategies.federated import TIMEOUT
from fedrebasin.strategies.finish import Finish
from fedrebasin.strategies.inner import chain, is_own, tell_passed_by
from fedrebasin.strategies.metrics import screen_evaluation
from fedrebasin.strategies.options import CorrectionRounds
from fedrebasin.strategies.part import Trunk
from fedrebasin.strategies.replies import ReplyScreen
from fedrebasin.strategies.widths import Widths


class Around(Strategy):
    """What :class:`Rebasin` does not change of the strategy inside.

    Attributes
    ----------
    strategy : Strategy
    checkpoint_dir : Path or None
    reference : str
    spec : PermutationSpec
    seed : int
    device : torch.device or None
    """

    strategy: Strategy
    checkpoint_dir: Path | None
    reference: str
    correction_rounds: CorrectionRounds
    spec: PermutationSpec
    seed: int
    device: torch.device | None
    _sent: ArrayRecord | None
    _beside: Beside
    _finish: Finish
    _screen: ReplyScreen
    _widths: Widths
    _trunk: Trunk
    _timeout: float = TIMEOUT
    _started: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strategy!r})"

    @property
    def beside(self) -> dict[str, ArrayRecord]:
        """The last averages of the records that travel beside the weights; what is put here is what is sent."""
        return self._beside.averages

    def summary(self) -> None:
        """Log the settings, then the inner strategy's."""
        log(INFO, "\t├──> Rebasin settings:")
        for name in ("reference", "matching", "correction", "correction_rounds", "select"):
            log(INFO, "\t│\t├── %s: %s", name, getattr(self, name))
        log(INFO, "\t│\t├── spec: %d perms, log10_order %.0f", len(self.spec.perm_shapes), self.spec.log10_order)
        log(INFO, "\t│\t├── seed: %s", self.seed)
        log(INFO, "\t│\t└── device: %s", self.device)
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = TIMEOUT,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds, as every strategy does; with ``checkpoint_dir`` those that are left.

        Nothing of an earlier run is sent, but for what was put into ``beside`` by hand.

        Raises
        ------
        UsageError
            If the folder cannot be written, another run writes to it, or what lies in it cannot be read or is of
            another run.
        """
        self._timeout, self._started = timeout, True
        self._sent = None  # the first round looks anew at which part of the model travels
        self._beside.forget()
        self._widths.forget()
        if self.reference != "global":
            tell_passed_by(self.strategy)
        self._finish = self._finish.in_run(num_rounds, self.correction_rounds)
        rest = (timeout, train_config, evaluate_config, evaluate_fn)
        with hold_folder(self.checkpoint_dir):
            if self._finish.queries is not None:
                self._finish.queries.account = Account(self.checkpoint_dir)
            if self.checkpoint_dir is None:
                return super().start(grid, initial_arrays, num_rounds, *rest)
            kept: dict[str, Beside | Widths] = {"beside": self._beside, "widths": self._widths}
            run = Checkpointed(self, kept, self.checkpoint_dir, self._trunk)
            return run.run(grid, initial_arrays, num_rounds, *rest)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the evaluation of the whole model."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the inner strategy aggregate the evaluation, without the replies that would end the run."""
        own = any(is_own(link, "aggregate_evaluate") for link in chain(self.strategy))  # privacy hands replies on
        kept = screen_evaluation(server_round, replies, "" if own else self._screen.weighted_by_key)
        return self.strategy.aggregate_evaluate(server_round, kept)
