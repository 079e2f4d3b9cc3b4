"""What an aligning strategy does in every round: send, align the replies, aggregate them, correct the result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.server import strategy as legacy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedrebasin import PermutationSpec, identity_perms
from fedrebasin.corrections.methods import CorrectionSetting
from fedrebasin.errors import RebasinError
from fedrebasin.strategies.aggregation import (
    adopt_model,
    aggregate,
    complete_model,
    fault_of,
    log_received,
    rewrite_replies,
)
from fedrebasin.strategies.alignment import Alignment, find_alignment, shares
from fedrebasin.strategies.around import Around
from fedrebasin.strategies.buffers import average_states
from fedrebasin.strategies.equal_weights import is_accounted, take_equal
from fedrebasin.strategies.inner import chain, check_not_wrapped_by_privacy, ignores_examples
from fedrebasin.strategies.matcher import Matcher
from fedrebasin.strategies.messages import names_of_weights, node_of_message, restore_buffers
from fedrebasin.strategies.pairs import to_pairs
from fedrebasin.strategies.part import Trunk, narrow
from fedrebasin.strategies.records import RecordView, select_arrays
from fedrebasin.strategies.replies import Screened
from fedrebasin.strategies.selection import Round, only_averages, plain_replies
from fedrebasin.strategies.workers import Workers


class Rounds(Around):
    """The rounds of :class:`fedrebasin.strategies.Rebasin`, which says what each part is."""

    model: nn.Module | None
    calibration: Any
    example_inputs: Any
    reference: str
    home: str
    arrayrecord_key: str
    guard: str
    _matcher: Matcher
    _trunk: Trunk
    _whole: tuple[PermutationSpec, Matcher]
    _workers: Workers
    _messages: list[Message]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy sample nodes; it sees the parameters alone, the nodes get the buffers too.

        Raises
        ------
        RebasinError
            In the first round, if ``arrays`` are not the model's or a part of it, or if a differential privacy wrapper
            stands around.
        """
        arrays = self._trunk.cut(arrays)
        if self._sent is None:
            check_not_wrapped_by_privacy()
            if self.checkpoint_dir is not None and not self._started:
                log(
                    WARNING,
                    "rebasin: nothing is kept in %s: checkpoints are written by %s.start, which a strategy around it "
                    "runs the rounds without; let this strategy be the outermost",
                    *(self.checkpoint_dir, type(self).__name__),
                )
            self.spec, self._matcher = narrow(*self._whole, arrays, self._finish.runs_the_model, self.home)
        self._sent = arrays
        trained = to_pairs(select_arrays(arrays, names_of_weights(self.spec, arrays)))
        messages = list(self.strategy.configure_train(server_round, trained, config, grid))
        restore_buffers(messages, self.arrayrecord_key, trained, arrays)
        self._beside.attach(messages)
        self._widths.attach(messages, self.arrayrecord_key)
        self._messages = messages
        queries = self._finish.of_round(server_round).queries
        if queries is not None:
            queries.prepare(server_round, grid, messages, self._timeout)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy configure the evaluation of what the nodes share."""
        messages = list(super().configure_evaluate(server_round, self._trunk.cut(arrays), config, grid))
        self._widths.attach(messages, self.arrayrecord_key)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align the replies, let the inner strategy aggregate them, correct the result."""
        started = time.perf_counter()
        sent = self._sent
        if sent is None:
            raise RebasinError("aggregate_train was called before configure_train, which gives it the sent model")
        screened = self._take(server_round, replies, sent)
        if screened is None:
            return None, None
        stepping = next((link for link in chain(self.strategy) if isinstance(link, legacy.Strategy)), self.strategy)
        screened, alignment = self._align(server_round, screened, sent, stepping)
        anew = alignment.apart and alignment.moves
        outside = anew and not ignores_examples(self.strategy)  # a median steps from no model
        trained = names_of_weights(self.spec, sent)
        finish, plain = self._finish.of_round(server_round), []
        if finish.selector is not None:
            plain = plain_replies(screened.replies, stepping, moves=alignment.moves, outside=outside)
        keep_ends = outside or finish.keeps_ends
        aligned = rewrite_replies(self.spec, alignment.perms, screened.replies, trained, keep_ends=keep_ends)
        coefficients = shares(screened.replies)
        seconds = time.perf_counter() - started
        arrays, metrics = aggregate(self.strategy, server_round, screened, aligned.ends if outside else None, trained)
        started = time.perf_counter()
        if arrays is None:
            return None, metrics
        buffers = {} if self.guard else average_states(aligned.buffers, coefficients)
        model = complete_model(arrays, buffers, sent)
        wrong = fault_of(model, sent)
        if wrong:
            log(WARNING, "rebasin: the aggregate of round %d %s; the model stays", server_round, wrong)
            return None, metrics
        finished = Round(model, plain, aligned.ends, screened.replies)
        corrected, figures = finish.run(self._setting(coefficients), finished)
        if anew or corrected is not None:
            model = model if corrected is None else corrected
            adopt_model(self.strategy, model, trained, anew=anew)
        perms = alignment.perms
        if finish.took_plain(figures):
            perms = [identity_perms(self.spec)] * len(perms)
        self._beside.settle(self.spec, perms, screened.replies, coefficients, anew=anew)
        metrics = MetricRecord() if metrics is None else metrics
        metrics["rebasin-moved-fraction"] = alignment.moved_fraction
        metrics["rebasin-objective-gain"] = alignment.objective_gain
        metrics["rebasin-seconds"] = seconds + time.perf_counter() - started
        metrics["rebasin-left-out"] = screened.left_out
        metrics["rebasin-reused"] = alignment.reused
        metrics.update(figures)
        return model, metrics

    def _take(self, server_round: int, replies: Iterable[Message], sent: ArrayRecord) -> Screened | None:
        """The replies that take part in the round; None, with a line in the log, where none does."""
        nodes = node_of_message(self._messages)
        replies = self._beside.take(replies)
        self._trunk.strip(replies, self.arrayrecord_key)
        self._widths.take(replies, self.arrayrecord_key, sent, nodes)
        screened = self._screen.screen(server_round, replies, sent, nodes, self._workers)
        if ignores_examples(self.strategy):  # then a claimed number decides nothing here either
            for reply in screened.replies:
                reply.examples = 1.0
        accounted = is_accounted(self.strategy)
        if accounted:
            screened = take_equal(screened, server_round)
        if screened.replies:
            return screened
        if accounted:  # the accountant forgets the release that this round was to be
            aggregate(self.strategy, server_round, screened, None, [])
        else:
            log_received(screened)
        log(WARNING, "rebasin: round %d has no reply to aggregate", server_round)
        return None

    def _align(
        self, server_round: int, screened: Screened, sent: ArrayRecord, stepping: Strategy | legacy.Strategy
    ) -> tuple[Screened, Alignment]:
        """The permutations of the round, and the replies without those that could not be matched."""
        alignment = find_alignment(
            *(self.spec, RecordView(sent), screened.replies, self._matcher),
            reference="global" if self.guard else self.reference,
            seed=self.seed,
            device=self.device,
            last=self._beside.trajectories.last(self.spec, screened.replies),
            workers=self._workers,
        )
        screened, alignment = _without_failed(screened, alignment)
        share = 100 * alignment.moved_fraction
        log(INFO, "aggregate_train: aligned to %s; %.1f%% of the units moved", alignment.how, share)
        steps = not (only_averages(stepping) or ignores_examples(self.strategy))
        if alignment.apart and not alignment.moves and steps:
            log(
                WARNING,
                "rebasin: no reply of round %d is near the model that was sent, and all have one order: %s steps from "
                "that model; if the clients begin from one of their own, give it as initial_arrays",
                *(server_round, type(stepping).__name__),
            )
        return screened, alignment

    def _setting(self, coefficients: Sequence[float]) -> CorrectionSetting | None:
        """What a correction needs beside the round's models; None where the strategy has a spec alone."""
        if self.model is None:
            return None
        return CorrectionSetting(
            self.model, self.calibration, coefficients, self.example_inputs, self.seed, self.device
        )


def _without_failed(screened: Screened, alignment: Alignment) -> tuple[Screened, Alignment]:
    """Leave out the replies that could not be matched to what the others were."""
    if not alignment.failed:
        return screened, alignment
    kept = [place for place in range(len(screened.replies)) if place not in alignment.failed]
    replies, left_out = [screened.replies[place] for place in kept], screened.left_out + len(alignment.failed)
    perms = [alignment.perms[place] for place in kept]
    return replace(screened, replies=replies, left_out=left_out), replace(alignment, perms=perms, failed=())
