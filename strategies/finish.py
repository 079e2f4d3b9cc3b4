"""What follows the aggregation of a round: one correction, or the best of several models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from logging import WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from torch import nn

from fedrebasin.corrections.federated import FEDERATED, FederatedOptions
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting
from fedrebasin.errors import NoSiteError
from fedrebasin.selection import names_of
from fedrebasin.strategies.client_selection import ClientSelector
from fedrebasin.strategies.correction import check_calibration, correct_record, default_correction, needs_ends
from fedrebasin.strategies.federated import Queries, build_queries
from fedrebasin.strategies.options import LAST, Correction, CorrectionRounds
from fedrebasin.strategies.selection import Round, Selector, build_selector

#: Federated corrections that set whole layers anew, so that the next round trains from far away.
SOLVED_BY_CLIENTS = ("federated-least-squares", "federated-regmean")


@dataclass(frozen=True)
class Finish:
    """The last stage of a round.

    Attributes
    ----------
    correction : str, sequence of str or None
        What was asked for, the default resolved.
    calibration : collection of batches, optional
        What corrections and matching may see of the server's data: all, or the part that selection leaves them.
    selector : Selector, optional
    queries : Queries, optional
        Where nodes are asked: for a federated correction, or to choose.
    rounds : collection of int or "last", optional
        Those that end with it; in all others the aggregate stays as it is. ``in_run`` says which one is the last.
    """

    correction: Correction
    calibration: Any = None
    selector: Selector | ClientSelector | None = None
    queries: Queries | None = None
    rounds: CorrectionRounds = None

    def of_round(self, server_round: int) -> Finish:
        """What a round ends with.

        >>> finish = Finish("repair", rounds=[1])
        >>> finish.of_round(1).correction, finish.of_round(2).correction
        ('repair', None)
        """
        follows = self.rounds is None or (self.rounds != LAST and server_round in self.rounds)
        return self if follows else Finish(None)

    def in_run(self, num_rounds: int, wanted: CorrectionRounds) -> Finish:
        """The stage of a run of so many rounds; tells of rounds that it does not reach, and of what may ruin it.

        >>> Finish("repair", rounds="last").in_run(5, "last").rounds
        [5]
        """
        if isinstance(wanted, str):
            return replace(self, rounds=[num_rounds])
        late = sorted(number for number in wanted or () if number > num_rounds)
        if late:
            log(WARNING, "rebasin: correction_rounds: %s: the run ends after round %d", late, num_rounds)
        if wanted is None and num_rounds > 1 and self.single in SOLVED_BY_CLIENTS:
            log(
                WARNING,
                "rebasin: correction=%r follows each of %d rounds, and clients train on from what it gives: where they "
                "train by SGD at a high rate that can ruin the network; correction_rounds='last' corrects the model "
                "that the run ends with",
                self.single,
                num_rounds,
            )
        return self

    @property
    def single(self) -> str | None:
        """The correction, where nothing is chosen."""
        return self.correction if isinstance(self.correction, str) and self.selector is None else None

    @property
    def runs_the_model(self) -> str | None:
        """The option that runs the whole model, as it was given, or ``None``."""
        if self.selector is not None:
            return f"select={'calibration' if isinstance(self.selector, Selector) else 'clients'!r}"
        return None if self.single is None else f"correction={self.single!r}"

    @property
    def keeps_ends(self) -> bool:
        """Tell whether it looks at the aligned replies."""
        return self.selector is not None or needs_ends(self.single)

    def took_plain(self, figures: Mapping[str, float]) -> bool:
        """Tell from a round's metrics whether the replies were kept in the order in which they came."""
        if self.selector is None or "rebasin-selected" not in figures:
            return False
        return self.selector.names[int(figures["rebasin-selected"])].startswith("plain")

    def run(self, setting: CorrectionSetting | None, found: Round) -> tuple[ArrayRecord | None, dict[str, float]]:
        """The model instead of the round's, ``None`` to keep that, and metrics."""
        if self.selector is not None:
            return self.selector.choose(found)
        if setting is None or self.single is None:
            return None, {}
        nodes = [reply.node for reply in found.replies]
        corrected = correct_record(self.single, setting, found.model, found.ends, nodes, self.queries)
        return corrected, {} if self.queries is None else dict(self.queries.metrics)


def build_finish(
    correction: Correction,
    select: str | None,
    model: nn.Module | None,
    calibration: Any,
    *,
    federated: FederatedOptions | None,
    loss: Callable[..., Any] | None,
    inputs: int,
    example_inputs: Any,
    guarded: bool,
    seed: int,
    device: torch.device | None,
) -> Finish:
    """Resolve the default, part the data if something is to be chosen, and try every correction once.

    Examples
    --------
    >>> nothing = dict(federated=None, loss=None, inputs=1, example_inputs=None, guarded=False, seed=0, device=None)
    >>> build_finish("default", None, nn.Linear(2, 1), None, **nothing)
    Finish(correction=None, calibration=None, selector=None, queries=None, rounds=None)
    """
    default = correction == "default"
    if default:
        correction = default_correction(model, calibration, guarded=guarded)
    finish, asked, votes = Finish(correction, calibration), tuple[str, ...](), select == "clients"
    names: tuple[str | None, ...] = (finish.single,)
    if votes:
        asked = names_of(correction, several=True, known=[*CORRECTIONS, *FEDERATED])
        names = asked or (None,)
    elif select is not None:
        asked = names_of(correction, several=True)
        selector = build_selector(
            *(select, asked, model, calibration), loss=loss, example_inputs=example_inputs, seed=seed, device=device
        )
        if selector is not None:
            finish, names = Finish(correction, selector.fit, selector), asked or (None,)
    for name in names:
        try:
            check_calibration(
                *(name, model, finish.calibration), inputs=inputs, example_inputs=example_inputs, device=device
            )
        except NoSiteError as error:
            if not default:
                raise
            log(WARNING, "rebasin: the model is not corrected: %s", error)
            return build_finish(
                *(None, select, model, calibration),
                federated=federated,
                loss=loss,
                inputs=inputs,
                example_inputs=example_inputs,
                guarded=guarded,
                seed=seed,
                device=device,
            )
    corrections = asked if votes else (finish.single,)
    finish = replace(finish, queries=build_queries(corrections, model, example_inputs, federated, device, votes=votes))
    if not votes or model is None or finish.queries is None:
        return finish
    chooser = ClientSelector(model, asked, finish.queries, calibration, example_inputs, seed, device)
    return replace(finish, selector=chooser)
