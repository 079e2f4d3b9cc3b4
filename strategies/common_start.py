"""Was a reply trained from the model that was sent? The rule behind ``reference="auto"``.

Let ``<R, M>`` be the sum of the products of the entries of two models, over the parameters that some permutation
moves, each tensor divided by its root mean square (R and M index the sent model and the reply). A reply trained
elsewhere has no reason to have its units in the sent model's order, so that ``<R, M>`` is one more draw of
``<R, P M>`` with a random relabelling P. With the mean m and the standard deviation s of ``DRAWS`` such draws,

    z   = (<R, M> - m) / s                    the evidence that the order is the sent model's
    gap = (<R, M> - m) / (<R, R> - m)         1 for a copy of the sent model, about 0 for an unrelated one

and a reply is **near** if z > ``EVIDENCE`` or gap > ``CLOSE``. The second clause is for narrow networks, in which few
relabellings exist and s is large. Parts that no relabelling changes (a norm's scales of one) cancel in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin import PermutationSpec, permute, random_perms

DRAWS = 16
EVIDENCE = 6.0
CLOSE = 0.5

State = dict[str, Tensor]


@dataclass(frozen=True)
class Nearness:
    """How much nearer a reply is to the sent model than its random relabellings are."""

    evidence: float
    gap: float

    @property
    def near(self) -> bool:
        """True if the reply was trained from the sent model, as far as its weights tell."""
        return self.evidence > EVIDENCE or self.gap > CLOSE


def measure_nearness(spec: PermutationSpec, sent: State, reply: State, *, seed: int = 0) -> Nearness:
    """Compare a reply with random relabellings of itself.

    Parameters
    ----------
    spec : PermutationSpec
    sent, reply : state dict
        The model that the server sent, and one that came back.
    seed : int
        Draws the relabellings.

    Returns
    -------
    Nearness
        Infinite evidence where there is nothing to relabel.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrebasin import trace
    >>> nets = [nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2)]
    >>> spec = trace(nets[0], (torch.randn(2, 8),))
    >>> a, b = (net.state_dict() for net in nets)
    >>> measure_nearness(spec, a, a).near, measure_nearness(spec, a, b).near
    (True, False)
    """
    moved = {axis.name for axes in spec.tied.values() for axis in axes}
    scales: dict[str, float] = {}
    for name in spec.parameters:
        if name in moved and sent[name].is_floating_point():
            product = _root_mean_square(sent[name]) * _root_mean_square(reply[name])
            if product > 0:
                scales[name] = 1 / product
    if not moved:
        return Nearness(math.inf, 1.0)
    here = _inner(sent, reply, scales)
    draws = torch.tensor(
        [_inner(sent, permute(spec, random_perms(spec, seed * DRAWS + draw), reply), scales) for draw in range(DRAWS)],
        dtype=torch.float64,
    )
    mean, spread = float(draws.mean()), float(draws.std())
    entries = float(sum(sent[name].numel() for name in scales))
    excess = here - mean
    tiny = 1e-9 * max(entries, 1.0)  # rounding, where every relabelling gives the same
    return Nearness(excess / max(spread, tiny), excess / max(entries - mean, tiny))


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def _inner(sent: State, reply: State, scales: dict[str, float]) -> float:
    return sum(
        scale * float(torch.dot(sent[name].flatten().double(), reply[name].flatten().double()))
        for name, scale in scales.items()
    )
