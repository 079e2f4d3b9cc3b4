"""Moments with differential privacy: every example's share is clipped, noise is added where the data lies.

Gram matrices and normal equations are in ``private_sums.py``: the same unit, and the same account.

A release is the vector of a site's per-channel means of ``x`` and ``x^2`` over ``n`` examples. An example's share is
its own such vector (averaged over positions), scaled to length ``C = clip * sqrt(2 channels)`` where it is longer;
where examples may not lie along the first axis, each position's vector is scaled, and the average has that bound, too.
Replacing one example moves the sum by at most ``2 C``; Gaussian noise of ``noise * 2 C`` makes it Gaussian
differentially private, ``1 / noise``-GDP, and ``k`` releases, chosen adaptively, ``sqrt(k) / noise``-GDP. That converts
exactly into

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)

The unit is one example of a node's data, replaced by another; the number of examples is public. It is the privacy of
the queries alone: a model that the node sends in training is not covered by it. Noise is drawn in floating point, whose
low bits an attacker could use (Mironov, 2012).

References
----------
Dong, Roth, Su (2022), "Gaussian differential privacy", JRSS B 84; Balle, Wang (ICML 2018), "Improving the Gaussian
mechanism for differential privacy".
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import log_ndtr
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin.corrections.moments import Moments
from fedrebasin.errors import RebasinError
from fedrebasin.seeds import generator_of


@dataclass(frozen=True)
class Privacy:
    """How a node's moments and Gram matrices are clipped and noised.

    Parameters
    ----------
    clip : float
        Largest root mean square, over channels, of an example's means of ``x`` and ``x^2`` (moments), or of a layer's
        inputs and targets (Gram matrices); what is longer is scaled.
    noise : float
        Standard deviation of the noise in units of what one example can change.
    delta : float
        At which epsilon is stated.
    budget : float
        The epsilon beyond which a node refuses further queries of a run.

    Examples
    --------
    >>> round(Privacy(clip=3.0, noise=2.0).epsilon(releases=1), 2)
    1.99
    """

    clip: float
    noise: float
    delta: float = 1e-5
    budget: float = math.inf

    def __post_init__(self) -> None:
        for name in ("clip", "noise", "budget"):
            if not getattr(self, name) > 0:
                raise RebasinError(f"{name}: expected a positive number; got {getattr(self, name)}")
        if not 0 < self.delta < 1:
            raise RebasinError(f"delta: expected a number between 0 and 1; got {self.delta}")

    def epsilon(self, releases: int) -> float:
        """The smallest epsilon that holds at ``delta`` after so many releases."""
        if not releases:
            return 0.0
        mu, low, high = math.sqrt(releases) / self.noise, 0.0, 1.0
        while _log_delta(high, mu) > math.log(self.delta):
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _log_delta(middle, mu) > math.log(self.delta) else (low, middle)
        return high


def _log_delta(epsilon: float, mu: float) -> float:
    first, second = float(log_ndtr(mu / 2 - epsilon / mu)), epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log1p(-math.exp(min(second - first, 0.0))) if second < first else -math.inf


def source_of_noise(seed: int | None) -> Callable[[Tensor], Tensor]:
    """Draws standard normal numbers of a tensor's shape, float64, from the system's randomness, or from ``seed``.

    >>> source_of_noise(0)(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    generator = generator_of(secrets.randbits(63) if seed is None else seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float64).to(like.device)

    return draw


def check_apart(net: nn.Module) -> None:
    """Refuse a network in which one example of a batch changes what the others give: nothing bounds its share then.

    Examples
    --------
    >>> check_apart(nn.BatchNorm1d(3, track_running_stats=False))
    Traceback (most recent call last):
    ...
    fedrebasin.errors.RebasinError: privacy: a BatchNorm goes by each batch's statistics; track running statistics
    """
    if any(isinstance(module, _BatchNorm) and module.running_mean is None for module in net.modules()):
        raise RebasinError("privacy: a BatchNorm goes by each batch's statistics; track running statistics")


def check_positions(positions: float) -> float:
    """Refuse a layer that meets more positions of one example than of another: their shares are not known then.

    >>> check_positions(6.0)
    6.0
    """
    if positions != round(positions) or positions < 1:
        raise RebasinError(
            f"privacy: a layer meets {positions:g} positions an example; expected the same whole number for each"
        )
    return positions


class ClippedMoments(Moments):
    """Sums of clipped shares of examples; :meth:`release` adds the noise and gives moments.

    Examples
    --------
    >>> shares = ClippedMoments(Privacy(clip=0.5, noise=1e-9))
    >>> shares.add(torch.tensor([[3.0], [0.1]]), dim=1)
    >>> shares.release(seed=0).mean  # (3, 9) is scaled to length 0.5 * sqrt(2)
    tensor([0.1618], dtype=torch.float64)
    """

    def __init__(self, privacy: Privacy) -> None:
        super().__init__()
        self.privacy, self.examples = privacy, 0

    @classmethod
    def maker(cls, privacy: Privacy | None) -> Callable[[], Moments]:
        """What makes the moments that are measured: exact ones without ``privacy``."""
        return Moments if privacy is None else lambda: cls(privacy)

    def add(self, activations: Tensor, dim: int, examples: int | None = None) -> None:
        """Add the clipped shares of so many examples; by default they lie along the first axis."""
        examples = len(activations) if examples is None else examples
        rows = activations.detach().double().movedim(dim, 1)
        if len(rows) != examples or examples in activations.shape[1:dim]:  # another axis may be that of the examples
            rows = rows.movedim(1, -1).flatten(0, -2).unsqueeze(2)
        rows = rows.reshape(*rows.shape[:2], -1)
        positions = check_positions(len(rows) / examples)
        share = torch.cat([rows.mean(2), rows.square().mean(2)], 1)
        length = share.norm(dim=1, keepdim=True)
        share = share * (self._bound(share.shape[1]) / length).clamp(max=1.0) / positions
        mean, square = share.sum(0).chunk(2)
        self.examples += examples
        self.count += rows.shape[0] * rows.shape[2]
        first = not self.mean.numel()
        self.mean, self.squares = (mean, square) if first else (self.mean + mean, self.squares + square)

    def release(self, seed: int | None = None) -> Moments:
        """Moments with noise from the system's source of randomness, or from ``seed`` (for tests)."""
        sums = torch.cat([self.mean, self.squares])
        noise = source_of_noise(seed)(sums)
        mean, square = ((sums + self.privacy.noise * 2 * self._bound(len(sums)) * noise) / self.examples).chunk(2)
        return Moments.of(self.count, mean, (square - mean.square()).clamp_min(0) * self.count)

    def _bound(self, numbers: int) -> float:
        return self.privacy.clip * math.sqrt(numbers)
