"""Rebasin: align the replies, aggregate them by any Flower strategy, correct the result (``rounds.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy

from fedrebasin import PermutationSpec
from fedrebasin.corrections.federated import FederatedOptions
from fedrebasin.errors import UsageError
from fedrebasin.strategies.beside import Beside, check_beside
from fedrebasin.strategies.correction import has_running_statistics, names_running_statistics
from fedrebasin.strategies.federated import TIMEOUT
from fedrebasin.strategies.finish import build_finish
from fedrebasin.strategies.inner import chain, check_strategy, guarded_by
from fedrebasin.strategies.matcher import build_matcher, uses_loss
from fedrebasin.strategies.network import Model, build_network, find_device
from fedrebasin.strategies.options import Correction, CorrectionRounds, check_guarded, check_options, check_rounds
from fedrebasin.strategies.part import Trunk, check_home, check_part
from fedrebasin.strategies.replies import build_screen
from fedrebasin.strategies.rounds import Rounds
from fedrebasin.strategies.widths import Widths
from fedrebasin.strategies.workers import Workers


class Rebasin(Rounds):
    """Align the clients' hidden units before another strategy aggregates them.

    Parameters
    ----------
    strategy : Strategy
        Any strategy of Flower's message API; it samples the nodes and aggregates the aligned replies.
    model : nn.Module or function of no arguments, optional
        The clients' model; its weights are not read. Needed unless ``spec`` is given, and for a correction.
    example_inputs : tuple of Tensor, optional
        One batch of the model's inputs, for the trace and the check of the spec; needed with ``model``.
    spec : PermutationSpec or path, optional
        A checked spec instead of ``model`` and ``example_inputs``; with them, it is checked again.
    calibration : iterable of batches, optional
        Inputs for the correction and the matching, read anew in every round; with targets if a loss is given.
    reference : {"auto", "global", "largest", "merge-many", "medoid", "cycle-consistent", "straight-through-many"}
        What the replies are aligned to: the model that was sent, the reply with most examples, or each other by that
        method of :func:`fedrebasin.match_many`. ``"auto"`` is the model that was sent, unless most replies were not
        trained from it (``common_start.py``): then ``"merge-many"``. Inside differential
        privacy, Krum, MultiKrum and Bulyan it is the model that was sent.
    matching : str
        A name of ``METHODS``. Those on data need ``model`` and ``calibration``, ``"sinkhorn"`` too if a loss is given.
        All but ``"weight"`` merge nothing jointly: see ``alignment.py``.
    correction : str, sequence of str or None
        A name of ``CORRECTIONS``; all but ``"bias-normalisation"`` need ``calibration``. ``"default"`` is ``"repair"``
        with calibration data (``"reset-batchnorm"`` inside differential privacy and selection), otherwise ``None``;
        ``None`` too where the model has no layer that repair can correct.
        A name of ``FEDERATED`` asks the clients, which register ``answer_queries``, about their own data instead.
        Several names with ``select``.
    correction_rounds : collection of int or "last", optional
        Numbers, from 1, of the rounds that end with the correction, or the selection; by default all do. From a common
        start a correction in the first round, or in the last, can be worth more than in every one, and after the last
        round nobody trains on from it. With ``"last"`` no round is corrected unless ``start`` runs them.
    federated : FederatedOptions, optional
        How a federated correction works.
    select : {None, "calibration", "clients"}
        Hand back the best of a round's models, plain, aligned and corrected (``selection.py``), measured on a quarter
        of ``calibration`` that nothing else sees; the data is then read once, at construction, and held in memory. Or
        measured by the clients (``client_selection.py``), whose ``answer_queries`` has ``held_out`` and ``loss``.
    loss : callable, optional
        ``loss(output, target)``, a mean over the batch, for ``matching="straight-through"`` or ``"sinkhorn"``, for
        ``reference="straight-through-many"``, which then needs ``model`` and ``calibration``, and for ``select``, which
        goes by agreement with the replies' ensemble without it.
    beside : sequence of str
        Further ArrayRecords of the replies, with names and shapes of the weights (control variates, moments, an EMA):
        permuted with them, averaged by the same shares into ``strategy.beside``, and sent with the next model.
    send_perms : bool
        Send each node, beside the next model, the permutations of its last reply, which
        :func:`perms_from_record` reads, so that it relabels the optimizer state and layers that it keeps.
    home : {"fixed", "relabelled"}
        Where ``initial_arrays`` are a part of the model, units that are tied to the rest are fixed; or they move, which
        only clients that relabel the rest by those permutations can bear.
    until : str, optional
        The module up to which nodes share a trunk, as for :func:`fedrebasin.merge_trunks`: that part alone is sent,
        aligned and aggregated; every node keeps a head of its own, of any shape, and may leave it in its replies.
    node_models : sequence of nn.Module or functions of no arguments
        Narrower networks of the model's kind that nodes may train: ``widths.py`` says what such a node gets and gives.
    checkpoint_dir : path, optional
        After every round the global model, the strategies' state, metrics and random states are written there; a run
        that is started on the same folder goes on at the next round (``checkpointed.py``).
    replies_at_once : int, optional
        At most so many replies are read and matched at once, each on its part of torch's threads, and never more than
        these; by default 4, and 1 on an accelerator. While it is matched, each holds some 20 MB (more where heads
        or groups are permuted) and its similarity matrices. The model does not depend on it (``workers.py``).
    seed : int
    device : torch.device or str, optional
        Where alignment and correction run.

    Raises
    ------
    RebasinError
        At construction: an option that is not built or does not fit the strategy, a spec that fails its check.
        In a round nothing is raised for a bad reply; it is left out, and the log says why.

    Notes
    -----
    A round apart (``alignment.py``) is a weighted average outside the inner strategy, which starts from its result in
    the next round (FedMedian and FedTrimmedAvg, which go by no examples, aggregate it themselves). Buffers never enter
    the inner strategy. Replies are taken in the order of a metric ``partition-id`` if all have one, so that sums do not
    depend on who was first. Metrics of every round:
    ``rebasin-moved-fraction`` (share of the hidden units that changed place, mean over the replies),
    ``rebasin-objective-gain`` (of the inner product of weights; data may choose to lower it; mean over matchings),
    ``rebasin-seconds`` (without the inner strategy's), ``rebasin-left-out`` (replies),
    ``rebasin-reused`` (replies that moved as their node's last one, ``trajectory.py``); of a federated correction also
    ``rebasin-query-rounds``, ``rebasin-query-bytes`` (both ways, all nodes) and ``rebasin-query-left-out`` (nodes);
    with ``select`` those of ``selection.py`` or ``client_selection.py``.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (ICLR 2023), "Git Re-Basin"; Jordan et al. (ICLR 2023), "REPAIR".

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAdam
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> strategy = Rebasin(FedAdam(eta=0.01), model=net, example_inputs=(torch.randn(2, 4),))
    >>> strategy.reference, strategy.correction
    ('auto', None)
    """

    def __init__(
        self,
        strategy: Strategy,
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
    ) -> None:
        added = set(vars(self))  # by a class derived from this one, before it calls this
        check_strategy(strategy)
        if any(isinstance(link, Rebasin) for link in chain(strategy)):
            raise UsageError("strategy: it aligns already; give Rebasin the strategy inside")
        self.guard = guarded_by(strategy)
        self.device = find_device(device)
        self._workers = Workers(replies_at_once, self.device)
        check_options(reference, matching, correction, select=select, seed=seed)
        check_guarded(self.guard, reference, correction, select)
        if self.guard and reference == "auto":
            log(WARNING, "rebasin: under %s the reference is the global model, whatever the replies are", self.guard)
        self.model, self.spec = build_network(model, example_inputs, spec, seed)
        self._finish = build_finish(
            *(correction, select, self.model, calibration),
            federated=federated,
            loss=loss,
            inputs=self.spec.inputs,
            example_inputs=example_inputs,
            guarded=bool(self.guard),
            seed=seed,
            device=self.device,
        )
        rounds = check_rounds(correction_rounds, self._finish.correction, select)
        self._finish = replace(self._finish, rounds=rounds)
        calibration = self._finish.calibration
        if select == "calibration" and not uses_loss(matching, reference):  # it is the selection's alone
            loss = None
        self._matcher = build_matcher(
            *(matching, self.spec, self.model, calibration),
            reference=reference,
            loss=loss,
            seed=seed,
            device=self.device,
        )
        statistics = has_running_statistics(self.model) or names_running_statistics(self.spec)
        if self.guard and statistics and self._finish.correction != "reset-batchnorm":
            log(
                WARNING,
                "rebasin: under %s no reply reaches running statistics: they stay those of the first model, and the "
                "model may be useless in evaluation mode; correction='reset-batchnorm' with model= and calibration "
                "data renews BatchNorm's",
                self.guard,
            )
        self.strategy = strategy
        self.calibration = calibration
        self.example_inputs = example_inputs
        self.reference = reference
        self.matching = matching
        self.correction = self._finish.correction
        self.correction_rounds = rounds if rounds is None or isinstance(rounds, str) else sorted(rounds)
        self.select = select
        self.seed = seed
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self._screen = build_screen(strategy, self.spec)
        self.arrayrecord_key = self._screen.arrayrecord_key
        self.home = check_home(home, perms=send_perms, how="send_perms=True")
        self._trunk = Trunk(self.spec, until)
        if self._trunk.names is not None:
            check_part(self.spec, self._matcher, self._trunk.names, self._finish.runs_the_model)
        unfit: dict[str, object] = {"until": until, "beside": beside, "send_perms": send_perms}
        unfit |= {"a federated correction": self._finish.queries, self.guard or "a guard": self.guard}
        key = self._screen.weighted_by_key
        self._widths = Widths(self.model, node_models, example_inputs, seed=seed, unfit=unfit, weighted_by_key=key)
        self._beside = Beside(check_beside(beside, self.arrayrecord_key, self.guard), send_perms)
        self._whole = self.spec, self._matcher
        self._sent, self._messages, self._started, self._timeout = None, [], False, TIMEOUT
        self.built_in = frozenset(vars(self)) - added | {"built_in"}
