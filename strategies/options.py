"""What the strategy's options may be, alone and with each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

from fedrebasin.corrections.federated import FEDERATED
from fedrebasin.corrections.methods import CORRECTIONS
from fedrebasin.errors import UsageError
from fedrebasin.matching.methods import JOINT_REFERENCES, METHODS, check_joint
from fedrebasin.seeds import generator_of
from fedrebasin.selection import names_of

Correction = str | Sequence[str] | None  # several only where something chooses among them
CorrectionRounds = Collection[int] | str | None  # of strings ``LAST`` alone
LAST = "last"  # the round that a run ends with, which it knows when it starts
VALUES: dict[str, tuple[str | None, ...]] = {
    "reference": ("auto", "global", "largest", *JOINT_REFERENCES),
    "matching": tuple(METHODS),
    "correction": (None, *CORRECTIONS, *FEDERATED),
    "select": (None, "calibration", "clients"),
}


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


def check_rounds(rounds: CorrectionRounds, correction: Correction, select: str | None) -> CorrectionRounds:
    """The rounds that end with a correction, each once, or ``LAST``.

    Examples
    --------
    >>> check_rounds("last", "repair", None)
    'last'
    >>> check_rounds([1, 5, 5], "repair", None) == {1, 5}
    True
    >>> check_rounds(3, "repair", None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedrebasin.errors.UsageError: correction_rounds: expected a collection of round numbers from 1, as [1], ...; got 3
    """
    if rounds is None:
        return None
    last = isinstance(rounds, str) and rounds == LAST
    numbers: list[Any] = list(rounds) if isinstance(rounds, Collection) and not last else []
    if not last and not (numbers and all(isinstance(one, Integral) and int(one) > 0 for one in numbers)):
        raise UsageError(
            "correction_rounds: expected a collection of round numbers from 1, as [1], 'last', or None for all; got "
            f"{rounds!r}"
        )
    if correction is None and select is None:
        raise UsageError(f"correction_rounds={rounds!r}: nothing is corrected; give correction= or select=, too")
    return LAST if last else frozenset(map(int, numbers))


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
