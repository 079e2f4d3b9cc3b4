"""What the strategy's options may be, and around which strategies it may stand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from logging import WARNING
from typing import Any

from flwr.common.logger import log
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedXgbBagging,
    FedXgbCyclic,
    MultiKrum,
    Strategy,
)
from flwr.serverapp.strategy.bulyan import Bulyan

from fedrebasin.corrections.federated import FEDERATED
from fedrebasin.corrections.methods import CORRECTIONS
from fedrebasin.errors import UsageError
from fedrebasin.matching.methods import JOINT_REFERENCES, METHODS, check_joint
from fedrebasin.seeds import generator_of
from fedrebasin.selection import names_of

Correction = str | Sequence[str] | None  # several only where something chooses among them
VALUES: dict[str, tuple[str | None, ...]] = {
    "reference": ("auto", "global", "largest", *JOINT_REFERENCES),
    "matching": tuple(METHODS),
    "correction": (None, *CORRECTIONS, *FEDERATED),
    "select": (None, "calibration", "clients"),
}
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


def check_option(name: str, value: object) -> None:
    """Refuse an unknown value, with the list of those that are known.

    Examples
    --------
    >>> check_option("matching", "magic")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedrebasin.errors.UsageError: matching: expected one of 'weight', 'activation', ...; got 'magic'
    """
    if value not in VALUES[name]:
        raise UsageError(f"{name}: expected one of {', '.join(map(repr, VALUES[name]))}; got {value!r}")


def check_options(reference: str, matching: str, correction: Correction, *, select: object, seed: int) -> None:
    """Refuse unknown values, what is no seed, and a reference that the matching cannot be used with.

    Examples
    --------
    >>> check_options("auto", "magic", "default", select=None, seed=0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedrebasin.errors.UsageError: matching: expected one of 'weight', 'activation', ...; got 'magic'
    """
    check_option("reference", reference)
    check_option("matching", matching)
    check_option("select", select)
    generator_of(seed)
    if correction != "default":
        for name in [correction] if isinstance(correction, str | None) else correction:
            check_option("correction", name)
            if select == "calibration" and name in FEDERATED:
                raise UsageError(
                    f"select={select!r} measures on the server's data, and correction={name!r} asks the clients; give "
                    "select='clients'"
                )
        if not isinstance(correction, str | None):
            names_of(correction, several=select is not None, known=[*CORRECTIONS, *FEDERATED])
    check_joint(matching, reference)


def chain(strategy: Strategy | legacy.Strategy) -> Iterator[Any]:
    """Yield the strategy, the one that it wraps, the one that that wraps, and so on, of either interface.

    Examples
    --------
    >>> from flwr.serverapp.strategy import FedAvg
    >>> [type(link).__name__ for link in chain(FedAvg())]
    ['FedAvg']
    """
    link: object = strategy
    while isinstance(link, Strategy | legacy.Strategy):
        yield link
        link = getattr(link, "strategy", None)


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


def check_guarded(guard: str, reference: str, correction: Correction, select: str | None = None) -> None:
    """Refuse, inside differential privacy or selection, what looks at the raw models of several clients."""
    if guard and select is not None:
        raise UsageError(
            f"select={select!r}: under {guard} it would compare with the clients' raw models, and might keep one of "
            "them, past clipping or selection; leave select out"
        )
    if guard and reference not in ("auto", "global"):
        raise UsageError(
            f"reference={reference!r}: under {guard} one client's permutation would depend on the other clients' raw "
            "models, before clipping or selection, so that nothing bounds one client's influence; use "
            "reference='global', or leave it 'auto'"
        )
    if guard and correction in FEDERATED:
        raise UsageError(
            f"correction={correction!r}: under {guard} its queries would bring in what clients compute from their raw "
            "models and data, without noise and outside the privacy accounting or the selection; use "
            "correction='reset-batchnorm' with calibration data on the server"
        )
    if guard and isinstance(correction, str) and correction in CORRECTIONS and CORRECTIONS[correction].ends:
        raise UsageError(
            f"correction={correction!r}: under {guard} it would bring in the clients' raw models, past clipping or "
            "selection; use correction='reset-batchnorm', which needs the calibration data alone"
        )


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
