"""What Flower's privacy accountant asks of a round: equal weights, and an end to every round that it has begun."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from logging import WARNING

from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy

from fedrebasin.strategies.inner import PRIVACY, chain
from fedrebasin.strategies.replies import Screened


def is_accounted(strategy: Strategy) -> bool:
    """Whether a wrapped differential privacy counts its releases.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg
    >>> is_accounted(FedAvg())
    False
    """
    return any(isinstance(link, PRIVACY) and getattr(link, "accountant", None) is not None for link in chain(strategy))


def take_equal(screened: Screened, server_round: int) -> Screened:
    """Leave out the replies with another number of examples than most, which would end the run."""
    if not screened.replies:
        return screened
    ((usual, _),) = Counter(reply.examples for reply in screened.replies).most_common(1)
    kept = []
    for reply in screened.replies:
        if reply.examples == usual:
            kept.append(reply)
            continue
        log(
            WARNING,
            "rebasin: node %d sent %g examples, most nodes %g, and the privacy accountant takes equal numbers alone; "
            "left out of round %d",
            *(reply.node, reply.examples, usual, server_round),
        )
    return replace(screened, replies=kept, left_out=screened.left_out + len(screened.replies) - len(kept))
