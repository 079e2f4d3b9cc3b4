"""What one comparison does: the same values on the command line, in the run's config and in the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fedrebasin.errors import UsageError
from fedrebasin.simulations.commands import MOST_SEED
from fedrebasin.simulations.competitors import COMMON_START, check_words, parse_strategies, rounds_of
from fedrebasin.simulations.data import CATALOGUE
from fedrebasin.simulations.models import DEFAULT_WIDTHS
from fedrebasin.simulations.partition import parse_partition

#: data set -> (network, its width, epochs of a client before its first upload, epochs of each later round)
USUAL = {
    "digits": ("mlp", 128, 40, 5),
    "mnist": ("mlp", 512, 10, 1),
    "cifar10": ("conv", 64, 12, 1),
    "cifar100": ("conv", 64, 12, 1),
}
STARTS = ("apart", "common", "joins:ROUND")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a comparison, but for hardware and versions.

    ``width`` 0, ``model`` "" and ``epochs`` 0 mean what :func:`resolve` puts there.
    """

    data: str = "digits"
    strategies: str = "fedavg,fedrebasin"
    rounds: int = 3
    partition: str = "biased:0.2"
    start: str = "apart"
    absent: float = 0.0
    model: str = ""
    width: int = 0
    norm: str = "batch"
    epochs: int = 0
    later_epochs: int = 0
    seeds: str = "0"
    reference: str = "auto"
    matching: str = "weight"
    correction: str = "none"
    select: str = "none"
    calibration: int = 1000
    server_lr: float = 0.01
    proximal_mu: float = 0.01
    device: str = "cpu"

    @property
    def seed_list(self) -> list[int]:
        """The seeds as numbers.

        >>> Settings(seeds="0,3").seed_list
        [0, 3]
        """
        return parse_seeds(self.seeds)

    @property
    def strategy_list(self) -> list[str]:
        """The strategies' names, in order."""
        return parse_strategies(self.strategies)

    @property
    def line_up(self) -> list[str]:
        """What runs: the strategies and, where clients or one of them start apart, FedAvg from a common start.

        >>> Settings().line_up
        ['fedavg', 'fedrebasin', 'fedavg@common']
        """
        return [*self.strategy_list, *([COMMON_START] if self.start != "common" else [])]


def parse_seeds(text: str) -> list[int]:
    """Read seeds as the command line writes them: one or more numbers with commas between.

    >>> parse_seeds("0,1,2")
    [0, 1, 2]
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds: expected whole numbers with commas between, as in 0,1,2; got {text!r}") from None
    if min(seeds) < 0 or max(seeds) > MOST_SEED or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds: expected different numbers from 0 up to {MOST_SEED}; got {text!r}")
    return seeds


def join_round(start: str) -> int:
    """The round in which a silo that trained apart joins; 0 where none does.

    Raises
    ------
    UsageError
        If ``start`` is none of ``apart``, ``common`` and ``joins:ROUND`` with a whole number from 2 up.

    Examples
    --------
    >>> join_round("joins:3"), join_round("common")
    (3, 0)
    """
    if start in ("apart", "common"):
        return 0
    kind, _, number = start.partition(":")
    if kind != "joins":
        raise UsageError(f"--start: expected {', '.join(STARTS[:-1])} or {STARTS[-1]}; got {start!r}")
    if not number.isdecimal() or int(number) < 2:
        raise UsageError(f"--start: joins takes a round from 2 up, as in joins:3; got {start!r}")
    return int(number)


def resolve(settings: Settings) -> Settings:
    """Check every value and put the data set's usual network, width and epochs where none was given.

    Raises
    ------
    UsageError
        With one line that names the option, what was expected and what came.

    Examples
    --------
    >>> settings = resolve(Settings())
    >>> settings.model, settings.width, settings.epochs
    ('mlp', 128, 40)
    """
    if settings.data not in CATALOGUE:
        raise UsageError(f"data set: expected one of {', '.join(CATALOGUE)}; got {settings.data!r}")
    model, width, epochs, later_epochs = USUAL[settings.data]
    if settings.start == "common":
        epochs = later_epochs
    if settings.model and settings.model not in DEFAULT_WIDTHS:
        raise UsageError(f"--model: expected one of {', '.join(DEFAULT_WIDTHS)}; got {settings.model!r}")
    if settings.norm not in ("batch", "layer"):
        raise UsageError(f"--norm: expected batch or layer; got {settings.norm!r}")
    if join_round(settings.start) > settings.rounds:
        raise UsageError(f"--start: expected a round up to the last, {settings.rounds}; got {settings.start!r}")
    if not 0 <= settings.absent < 1:
        raise UsageError(f"--absent: expected a probability, 0 <= P < 1; got {settings.absent}")
    for name, value in (("rounds", settings.rounds), ("calibration", settings.calibration)):
        if value < 1:
            raise UsageError(f"--{name}: expected at least 1; got {value}")
    for name in ("width", "epochs", "later_epochs"):
        if getattr(settings, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')}: expected a positive number; got {getattr(settings, name)}")
    for name, number in (("server-lr", settings.server_lr), ("proximal-mu", settings.proximal_mu)):
        if not 0 < number < float("inf"):
            raise UsageError(f"--{name}: expected a positive number; got {number}")
    parse_partition(settings.partition)
    parse_seeds(settings.seeds)
    strategies = parse_strategies(settings.strategies)
    for name in strategies:
        if max(rounds_of(name) or [0]) > settings.rounds:
            raise UsageError(f"--strategies: expected rounds up to the last, {settings.rounds}; got {name!r}")
    check_words(settings.reference, settings.matching, settings.correction, settings.select, strategies)
    chosen = settings.model or model
    return replace(
        settings,
        model=chosen,
        width=settings.width or (width if chosen == model else DEFAULT_WIDTHS[chosen]),
        epochs=settings.epochs or epochs,
        later_epochs=settings.later_epochs or later_epochs,
    )


def to_run_config(settings: Settings) -> dict[str, str | int | float]:
    """The values under the keys of a Flower run config.

    >>> to_run_config(Settings())["later-epochs"]
    0
    """
    return {key.replace("_", "-"): value for key, value in asdict(settings).items()}


def from_run_config(config: Mapping[str, object]) -> Settings:
    """The reverse of :func:`to_run_config`, checked; other keys are left alone.

    >>> from_run_config({"data": "mnist", "data-file": ""}).epochs
    10
    """
    known = {field.name.replace("_", "-"): field.name for field in fields(Settings)}
    values: dict[str, Any] = {known[key]: value for key, value in config.items() if key in known}
    return resolve(Settings(**values))
