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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin import PermutationSpec, random_perms
from fedrebasin.permute import permute_tensor

DRAWS = 16
EVIDENCE = 6.0
CLOSE = 0.5

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Nearness:
    """How much nearer a reply is to the sent model than its random relabellings are."""

    evidence: float
    gap: float

    @property
    def near(self) -> bool:
        """True if the reply was trained from the sent model, as far as its weights tell."""
        return self.evidence > EVIDENCE or self.gap > CLOSE


def measure_nearness(
    spec: PermutationSpec, sent: State, replies: Sequence[Mapping[str, Tensor]], *, seed: int = 0
) -> list[Nearness]:
    """Compare replies with random relabellings of themselves.

    Since ``<R, P M>`` is ``<Q R, M>`` with Q the inverse of P, the sent model is relabelled, once for all replies and
    tensor by tensor: replies may decode a tensor when it is asked for.

    Parameters
    ----------
    spec : PermutationSpec
    sent : state dict
        The model that the server sent.
    replies : sequence of mapping of str to Tensor
        What came back.
    seed : int
        Draws the relabellings.

    Returns
    -------
    list of Nearness
        Infinite evidence where there is nothing to relabel.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrebasin import trace
    >>> nets = [nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2)]
    >>> spec = trace(nets[0], (torch.randn(2, 8),))
    >>> a, b = (net.state_dict() for net in nets)
    >>> [found.near for found in measure_nearness(spec, a, [a, b])]
    [True, False]
    """
    moved = {axis.name for axes in spec.tied.values() for axis in axes}
    if not moved:
        return [Nearness(math.inf, 1.0) for _ in replies]
    # a seed of 64 bits stays one
    perms = [random_perms(spec, (seed * DRAWS + draw) % 2**63) for draw in range(DRAWS)]
    shape = (len(replies), 1 + DRAWS)
    products = torch.zeros(shape, dtype=torch.float64, device="cpu")  # <R, M>, then <Q R, M> for each draw
    entries = torch.zeros(len(replies), dtype=torch.float64, device="cpu")
    for name in (name for name in spec.parameters if name in moved and sent[name].is_floating_point()):
        size = _root_mean_square(sent[name])
        own = sent[name].float() if size > 0 else sent[name]
        tensors = [reply[name].to(own.dtype).flatten() if size > 0 else own for reply in replies]
        scales = [size * _root_mean_square(tensor) for tensor in tensors]
        for draw in range(1 + DRAWS if size > 0 else 0):
            relabelled = (own if draw == 0 else permute_tensor(spec.axes[name], perms[draw - 1], own)).flatten()
            for place, (tensor, scale) in enumerate(zip(tensors, scales, strict=True)):
                if scale > 0:
                    products[place, draw] += float(torch.dot(relabelled, tensor)) / scale
        counts = [float(own.numel()) if scale > 0 else 0.0 for scale in scales]
        entries += torch.tensor(counts, dtype=torch.float64, device="cpu")
    return [_judge(row, float(count)) for row, count in zip(products, entries, strict=True)]


def _judge(products: Tensor, entries: float) -> Nearness:
    here, draws = float(products[0]), products[1:]
    mean, spread = float(draws.mean()), float(draws.std())
    excess = here - mean
    tiny = 1e-6 * max(entries, 1.0)  # rounding, where every relabelling gives the same
    return Nearness(excess / max(spread, tiny), excess / max(entries - mean, tiny))


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
