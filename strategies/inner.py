"""The strategies inside: the chain of them, which of them are known to guard or to step, and which are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from logging import WARNING
from typing import Any

from flwr.common.logger import log
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    MultiKrum,
    Strategy,
)
from flwr.serverapp.strategy.bulyan import Bulyan

from fedrebasin.errors import UsageError

PRIVACY = (
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    legacy.DifferentialPrivacyServerSideFixedClipping,
    legacy.DifferentialPrivacyServerSideAdaptiveClipping,
)
CLIENT_SIDE_PRIVACY = (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
    legacy.DifferentialPrivacyClientSideFixedClipping,
    legacy.DifferentialPrivacyClientSideAdaptiveClipping,
)
SELECTION = (MultiKrum, Bulyan, legacy.Krum, legacy.Bulyan)  # Krum of the message API is a MultiKrum
UNWEIGHTED = (FedMedian, FedTrimmedAvg, legacy.FedMedian, legacy.FedTrimmedAvg)


def chain(strategy: Strategy | legacy.Strategy) -> Iterator[Any]:
    """Yield the strategy, the one that it wraps, the one that that wraps, and so on, of either interface.

    Flower's wrappers hold it as ``strategy``; a user's may hold it under any name.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg
    >>> [type(link).__name__ for link in chain(FedAvg())]
    ['FedAvg']
    """
    link: object = strategy
    seen: list[object] = []
    while isinstance(link, Strategy | legacy.Strategy) and not any(link is one for one in seen):
        yield link
        seen.append(link)
        held = [value for value in vars(link).values() if isinstance(value, Strategy | legacy.Strategy)]
        link = getattr(link, "strategy", held[0] if held else None)


def read_attribute(strategy: Strategy | legacy.Strategy, name: str, default: Any) -> Any:
    """Read an attribute from the first link of the chain that has it."""
    return next((getattr(link, name) for link in chain(strategy) if hasattr(link, name)), default)


def is_own(strategy: Strategy, method: str) -> bool:
    """Tell whether a method is a user's own: Flower's own refuse replies with more than one record of a kind.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAdam
    >>> is_own(FedAdam(), "aggregate_train")
    False
    """
    return not str(getattr(type(strategy), method).__module__).startswith("flwr.")


def guarded_by(strategy: Strategy) -> str:
    """Name the wrapped differential privacy or selection strategy, or return ``""``.

    Inside one, the choice of the permutations, the buffers and REPAIR's goals must not depend on the raw model of
    another client: privacy's sensitivity would have no bound, and what selection rejects would come in again.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg, Krum
    >>> guarded_by(Krum()), guarded_by(FedAvg())
    ('Krum', '')
    """
    return next((type(link).__name__ for link in chain(strategy) if isinstance(link, (*PRIVACY, *SELECTION))), "")


def tell_passed_by(strategy: Strategy) -> None:
    """Warn of a user's own ``aggregate_train``, which is not called where a round's replies were trained apart."""
    own = next((type(link).__name__ for link in chain(strategy) if is_own(link, "aggregate_train")), "")
    if own and not guarded_by(strategy) and not ignores_examples(strategy):
        log(
            WARNING,
            "rebasin: if a round's replies were trained apart their average does not pass through %s.aggregate_train, "
            "which might step from the model that was sent; if it must see every aggregate (to add noise, to save a "
            "file), give reference='global'",
            own,
        )


def is_private(strategy: Strategy) -> bool:
    """Tell whether a wrapped differential privacy adds noise on the server.

    Examples
    --------
    >>> from flwr.serverapp.strategy import Krum
    >>> is_private(Krum())
    False
    """
    return any(isinstance(link, PRIVACY) for link in chain(strategy))


def ignores_examples(strategy: Strategy) -> bool:
    """Tell whether every reply counts the same in the aggregate, whatever number of examples it claims.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg, FedMedian
    >>> ignores_examples(FedMedian()), ignores_examples(FedAvg())
    (True, False)
    """
    return any(isinstance(link, UNWEIGHTED) for link in chain(strategy))


def check_strategy(strategy: object) -> None:
    """Refuse to stand around a strategy for which alignment on the server is wrong or means nothing."""
    if not isinstance(strategy, Strategy):
        raise UsageError(
            f"strategy: expected an instance of flwr.serverapp.strategy.Strategy (the message API), as in "
            f"Rebasin(FedAvg(), ...); got {strategy!r}"
        )
    for link in chain(strategy):
        name = type(link).__name__
        if isinstance(link, Strategy) and type(link).start is not Strategy.start:
            log(
                WARNING, "rebasin: %s.start is not called, since Rebasin's runs the rounds; let evaluate_fn do it", name
            )
        if isinstance(link, CLIENT_SIDE_PRIVACY):
            raise UsageError(
                f"strategy: {name} has the clients clip before the server aligns, so that the clipped updates are "
                "those of unaligned models; align on the client (rebasin_mod, last in its list of mods), or use the "
                "server-side wrapper of the same name inside Rebasin"
            )
        if isinstance(link, (FedXgbBagging, FedXgbCyclic)):
            raise UsageError(f"strategy: {name} aggregates trees, which have no hidden units to align")


def check_not_wrapped_by_privacy() -> None:
    """Refuse to run inside a differential privacy wrapper, which must be one of the callers.

    The wrapper's constructor only stores the strategy, so that its call of ``configure_train`` is the first moment at
    which it can be seen; nothing has been sent by then.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, (*PRIVACY, *CLIENT_SIDE_PRIVACY)):
            name = type(caller).__name__
            raise UsageError(
                f"{name}(Rebasin(...)) clips before alignment; turn them round: Rebasin({name}(FedAvg(), ...), ...)"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back
