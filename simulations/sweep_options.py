"""What a sweep varies, and at which values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedrebasin.errors import UsageError
from fedrebasin.simulations.disjoint_options import DEFAULTS, DisjointOptions, check_options

#: what is varied -> values by model, or by data set where it has its own
VALUES: dict[str, dict[str, tuple[float, ...]]] = {
    "width": {
        "digits": (64, 128, 256, 512, 1024, 2048),
        "mnist": (256, 512, 1024),
        "mlp": (256, 512, 1024),
        "conv": (32, 64, 128),
        "vgg": (8, 16, 32),
        "resnet20": (1, 2, 4),
    },
    "epochs": {"": (1, 3, 10, 30)},
    "held": {"": (0.05, 0.1, 0.2, 0.35, 0.5)},
}


@dataclass(frozen=True)
class SweepOptions:
    """What ``fedrebasin reproduce sweep`` was asked for.

    Attributes
    ----------
    base : DisjointOptions
        Everything but what is varied.
    over : {"width", "epochs", "held"}
    values : sequence of float
    same_data : bool
        Both ends train on all the data, from different starts and in another order.
    """

    base: DisjointOptions
    over: str
    values: Sequence[float]
    same_data: bool = False

    def at(self, value: float) -> DisjointOptions:
        """The options of one value."""
        changed: dict[str, Any] = {self.over: value if self.over == "held" else int(value)}
        return replace(self.base, **changed)


def parse_over(text: str, dataset: str, model: str | None = None) -> tuple[str, tuple[float, ...]]:
    """Read ``width``, ``epochs`` or ``held``, with values after a colon or the usual ones.

    Raises
    ------
    UsageError
        For another name, or values that are not different numbers, whole but for ``held``.

    Examples
    --------
    >>> parse_over("width:64,128", "digits")
    ('width', (64, 128))
    >>> parse_over("held", "digits")
    ('held', (0.05, 0.1, 0.2, 0.35, 0.5))
    """
    over, colon, listed = text.partition(":")
    if over not in VALUES:
        raise UsageError(f"--over: expected one of {', '.join(VALUES)}, or NAME:VALUE,VALUE; got {text!r}")
    if not colon:
        usual = VALUES[over]
        model = model or DEFAULTS.get(dataset, ("mlp",))[0]
        own = dataset if model == "mlp" and dataset in usual else model
        return over, usual.get(own, usual.get("", (1.0,)))
    kind: type[int] | type[float] = float if over == "held" else int
    try:
        values = tuple(kind(word) for word in listed.split(","))
    except ValueError:
        raise UsageError(
            f"--over: expected numbers as in {over}:{VALUES['held' if kind is float else 'epochs']['']}; got {listed!r}"
        ) from None
    if len(set(values)) < len(values):
        raise UsageError(f"--over: expected each value once; got {listed!r}")
    return over, values


def check_sweep(options: SweepOptions) -> None:
    """Refuse what cannot be met, at any value.

    Raises
    ------
    UsageError
        As ``check_options`` does, and for a held-out share where both ends see all the data.
    """
    if options.same_data and options.over == "held":
        raise UsageError("--same-data: expected --over width or epochs, because both ends see everything; got held")
    if not options.values:
        raise UsageError("--over: expected at least one value")
    for value in options.values:
        check_options(options.at(value))
