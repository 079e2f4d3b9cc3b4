"""distill: train the merged network, for a short time, on what the ends say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin.batches import tensors
from fedrebasin.corrections.working import begin, extract, load
from fedrebasin.errors import CalibrationError, RebasinError


def distill(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    epochs: int = 10,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Train the merged network to give the average of the ends' class probabilities.

    Adam on the cross-entropy to ``sum_k c_k softmax(logits_k)``, a step for each calibration batch, in an order drawn
    anew in each epoch, with a rate that falls to 0 along a half cosine. BatchNorms go by the batch and renew their
    statistics; dropout is off.

    Parameters
    ----------
    net, merged, ends, coefficients, device
        As for :func:`fedrebasin.repair`.
    calibration : iterable of batches
        Inputs, no labels, which are held in memory; batches of about 100 suit. Classes lie along axis 1 of the
        network's (first) output.
    epochs : int
        Passes over the data.
    lr : float
        Adam's rate at the start.
    seed : int
        Of the order of the batches: equal seeds give equal results.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``merged``.

    Raises
    ------
    CalibrationError
        If the data is empty, can be read only once, or a loss is not finite.
    RebasinError
        If coefficients do not fit, ``epochs`` is below 1 or ``lr`` not positive.

    References
    ----------
    Lin, Kong, Stich, Jaggi (NeurIPS 2020), "Ensemble distillation for robust model fusion in federated learning".

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ends = [net.state_dict(), net.state_dict()]
    >>> list(distill(net, net.state_dict(), ends, [torch.randn(200, 4)], epochs=1))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if epochs < 1:
        raise RebasinError(f"epochs: expected 1 or more; got {epochs}")
    if not 0 < lr < float("inf"):
        raise RebasinError(f"lr: expected a positive number; got {lr}")
    model, batches, weights = begin(net, merged, ends, calibration, coefficients, device)
    model.requires_grad_(True)
    held = [(args, kwargs) for args, kwargs, _ in batches]
    goals = _goals(model, ends, weights, held)
    load(model, merged)
    for module in model.modules():
        module.train(isinstance(module, _BatchNorm))
    steps = epochs * len(held)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for place in torch.randperm(len(held), generator=generator).tolist():
                args, kwargs = held[place]
                loss = -(goals[place] * tensors(model(*args, **kwargs))[0].log_softmax(1)).sum(1).mean()
                if not bool(loss.isfinite()):
                    raise CalibrationError(f"distill: the loss became {loss.item()}; check the inputs, or lower lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    result = extract(model, merged)
    return {name: x if x.is_floating_point() else merged[name].clone() for name, x in result.items()}


@torch.no_grad()
def _goals(
    model: nn.Module, ends: Sequence[Mapping[str, Tensor]], weights: Sequence[float], held: Sequence[Any]
) -> list[Tensor]:
    goals: list[Tensor] = []
    for end, weight in zip(ends, weights, strict=True):
        load(model, end)
        said = [weight * tensors(model(*args, **kwargs))[0].softmax(1) for args, kwargs in held]
        goals = [a + b for a, b in zip(goals, said, strict=True)] if goals else said
    return goals
