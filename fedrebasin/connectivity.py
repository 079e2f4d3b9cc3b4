"""Loss along the straight line between two models, and its barrier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import batches_of, mean_loss
from fedrebasin.corrections.working import load, working_copy
from fedrebasin.errors import RebasinError
from fedrebasin.merge import interpolate

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class LossPath:
    """Mean loss at points of the line between two models.

    Attributes
    ----------
    lams : tuple of float
        In [0, 1], ascending: 0 is the reference, 1 the model.
    losses : tuple of float
    """

    lams: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best_lam(self) -> float:
        """Where the loss is lowest."""
        return self.lams[self.losses.index(min(self.losses))]


def loss_along_path(
    net: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    loss: Loss,
    lams: int | Iterable[float] = 25,
    device: torch.device | str | None = None,
) -> LossPath:
    """Evaluate ``(1 - lam) * a + lam * b`` on labelled batches, at evenly spaced or given ``lam``.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    a, b : dict of str to Tensor
        State dicts of the ends.
    batches : iterable of (input, target)
        Read once for each ``lam``.
    loss : callable
        ``loss(output, target)``, a mean over the batch.
    lams : int or iterable of float
        How many points from 0 to 1, or the points; a barrier needs both ends among them.
    device : str, optional
        Where the network runs; by default where ``a`` is.

    Returns
    -------
    LossPath

    Raises
    ------
    CalibrationError
        If a batch has no target.
    RebasinError
        If fewer than two points are asked for.

    Examples
    --------
    >>> net = nn.Linear(2, 1)
    >>> data = [(torch.ones(4, 2), torch.zeros(4, 1))]
    >>> path = loss_along_path(net, net.state_dict(), net.state_dict(), data, loss=nn.functional.mse_loss, lams=3)
    >>> path.lams
    (0.0, 0.5, 1.0)
    """
    points = tuple(index / (lams - 1) for index in range(lams)) if isinstance(lams, int) and lams > 1 else lams
    if isinstance(points, int) or len(found := tuple(sorted(float(lam) for lam in points))) < 2:
        raise RebasinError(f"lams: expected two points or more; got {lams}")
    model = working_copy(net, a, device)
    where = device if device is not None else next(iter(a.values())).device
    data = batches_of(net, batches, name="batches", device=where)
    losses = []
    for lam in found:
        load(model, interpolate(a, b, lam))
        losses.append(mean_loss(data, lambda args, kwargs, target: loss(model(*args, **kwargs), target)))
    return LossPath(found, tuple(losses))


def loss_barrier(path: LossPath) -> float:
    """``max_lam L(lam) - (L(0) + L(1)) / 2``.

    Parameters
    ----------
    path : LossPath
        With both ends.

    Returns
    -------
    float

    Raises
    ------
    RebasinError
        If the path lacks 0 or 1.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Definition 2.2.

    Examples
    --------
    >>> loss_barrier(LossPath((0.0, 0.5, 1.0), (1.0, 4.0, 2.0)))
    2.5
    """
    return max(path.losses) - sum(_ends(path)) / 2


def barrier_above_chord(path: LossPath) -> float:
    """``max_lam L(lam) - ((1 - lam) L(0) + lam L(1))``: for ends of unequal loss, where it is 0 at both.

    Parameters and errors as for :func:`loss_barrier`.

    Returns
    -------
    float

    Examples
    --------
    >>> barrier_above_chord(LossPath((0.0, 0.5, 1.0), (1.0, 1.5, 2.0)))
    0.0
    """
    first, last = _ends(path)
    return max(value - ((1 - lam) * first + lam * last) for lam, value in zip(path.lams, path.losses, strict=True))


def _ends(path: LossPath) -> tuple[float, float]:
    if (path.lams[0], path.lams[-1]) != (0, 1):
        raise RebasinError(
            f"path: expected lams from 0 to 1, since a barrier counts from both ends' losses; got {path.lams[0]:g} to "
            f"{path.lams[-1]:g}; add 0 and 1 to the lams of loss_along_path"
        )
    return path.losses[0], path.losses[-1]
