"""Running statistics and counters: kept out of the inner strategy, and put back after it.

An inner strategy treats every array as a weight: a server optimizer drives variances below zero, a counter swamps a
clipping norm, FedAvg returns counters as floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedrebasin.coefficients import wide_type

State = dict[str, Tensor]


def average_states(states: Sequence[State], coefficients: Sequence[float]) -> State:
    """Average the floating and complex tensors of several state dicts; take the largest of integers.

    Sums are taken in the order given and in the tensors' precision (float32 for narrower types), as FedAvg takes them:
    where no unit moves, what is averaged has FedAvg's bits.

    Parameters
    ----------
    states : sequence of state dict
        Or the buffers of each; with the same keys.
    coefficients : sequence of float
        Sum to 1.

    Returns
    -------
    state dict
        Same keys, order and dtypes. A counter is the largest of the replies', not their sum: it says
        how long the statistics have been averaged, and the clients trained at the same time.

    Examples
    --------
    >>> one = {"mean": torch.tensor([0.0]), "count": torch.tensor(3)}
    >>> two = {"mean": torch.tensor([1.0]), "count": torch.tensor(5)}
    >>> average_states([one, two], [0.75, 0.25])
    {'mean': tensor([0.2500]), 'count': tensor(5)}
    """
    if not states:
        return {}
    found: State = {}
    for name, first in states[0].items():
        tensors = [one[name] for one in states]
        if wide_type(first) is None:
            found[name] = torch.stack([tensor.long() for tensor in tensors]).amax(0).to(first.dtype)
            continue
        wide = first.dtype if first.dtype.itemsize >= 4 else torch.float32
        total = torch.zeros_like(first, dtype=wide)
        for tensor, share in zip(tensors, coefficients, strict=True):
            total += tensor.to(wide) * share
        found[name] = total.to(first.dtype)
    return found
