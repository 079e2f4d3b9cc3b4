"""Mean and standard deviation of activations per channel, streamed over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches
from fedrebasin.corrections.calls import examples_in
from fedrebasin.corrections.passes import Stop
from fedrebasin.corrections.sites import Site
from fedrebasin.corrections.taps import tap
from fedrebasin.errors import CalibrationError


class Moments:
    """Running count, mean and sum of squared deviations per channel, merged batch by batch in float64.

    Examples
    --------
    >>> moments = Moments()
    >>> moments.add(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), dim=1)
    >>> moments.mean, moments.std
    (tensor([2., 5.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.squares = torch.zeros(0, dtype=torch.float64, device="cpu")

    @classmethod
    def of(cls, count: int, mean: Tensor, squares: Tensor) -> Moments:
        """Moments that were measured elsewhere; ``squares`` sums the squared deviations from ``mean``."""
        moments = cls()
        moments.count, moments.mean, moments.squares = count, mean, squares
        return moments

    def add(self, activations: Tensor, dim: int, examples: int | None = None) -> None:
        """Add activations whose channels lie along ``dim`` (Chan et al.'s update), of so many examples."""
        rows = activations.detach().movedim(dim, 0).flatten(1).double()
        mean = rows.mean(1)
        self.join(Moments.of(rows.shape[1], mean, (rows - mean.unsqueeze(1)).square().sum(1)))

    def join(self, other: Moments) -> None:
        """Add what others measured."""
        count, mean, squares = other.count, other.mean, other.squares
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, delta = self.count + count, mean - self.mean
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel (biased)."""
        return (self.squares / max(1, self.count)).sqrt()

    def check(self, name: str) -> None:
        """Raise :class:`CalibrationError` if an activation was NaN or infinite."""
        if not bool(self.mean.isfinite().all() and self.squares.isfinite().all()):
            raise CalibrationError(
                f"calibration: the activations of {name!r} hold a NaN or an infinity; check the models and the inputs"
            )


#: what makes the moments that a pass fills
Maker = Callable[[], Moments]


def output_moments(
    model: nn.Module, batches: Batches, sites: Sequence[Site], make: Maker = Moments
) -> dict[str, Moments]:
    """Moments of every site's output, in one pass."""
    return _measure(model, batches, sites, make, outputs=True)


def all_moments(model: nn.Module, batches: Batches, sites: Sequence[Site], make: Maker = Moments) -> dict[str, Moments]:
    """Moments of every BatchNorm's input and every other site's output, in one pass.

    In that pass BatchNorms go by the batch's statistics, so that what lies behind one does not see those of another
    network's activations.
    """
    try:
        return _measure(model, batches, sites, make, by_batch=True)
    except ValueError as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"calibration: BatchNorm needs batches of more than one example ({error})") from error


def site_moments(model: nn.Module, batches: Batches, site: Site, make: Maker = Moments) -> Moments:
    """Moments of one site's output, of a BatchNorm's input; the pass stops there."""
    return _measure(model, batches, [site], make, stop=True)[site.name]


@torch.no_grad()
def _measure(
    model: nn.Module,
    batches: Batches,
    sites: Sequence[Site],
    make: Maker,
    *,
    outputs: bool = False,
    stop: bool = False,
    by_batch: bool = False,
) -> dict[str, Moments]:
    found = {site.name: make() for site in sites}
    examples = 0

    def see(site: Site, into: Tensor, output: Tensor) -> None:
        found[site.name].add(into if site.running and not outputs else output, site.dim, examples)
        if stop:
            raise Stop

    with tap(model, sites, see, by_batch=by_batch):
        for args, kwargs, _ in batches:
            examples = examples_in((args, kwargs))
            with suppress(Stop):
                model(*args, **kwargs)
    for name, moments in found.items():
        moments.check(name)
    return found
