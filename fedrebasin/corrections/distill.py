"""distill: train the merged network, for a short time, on what the ends say together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from fedrebasin.batches import copied, tensors
from fedrebasin.coefficients import wide_type
from fedrebasin.corrections.calls import examples_in
from fedrebasin.corrections.passes import Batch
from fedrebasin.corrections.reset import check_too_small, norms_with_statistics, renew_statistics
from fedrebasin.corrections.working import begin, extract, load, warn_of_few
from fedrebasin.errors import CalibrationError, RebasinError
from fedrebasin.modules import deep_copy
from fedrebasin.seeds import generator_of

#: Share of the merge's statistics that may be left in a BatchNorm's running average.
_STALE = 0.02


@torch.inference_mode(False)
def distill(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    epochs: int = 10,
    lr: float = 1e-3,
    reread: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Train the merged network to give the average of the ends' class probabilities.

    Adam on the cross-entropy to ``sum_k c_k softmax(logits_k)``, a step for each calibration batch, in an order drawn
    anew in each epoch, with a rate that falls to 0 along a half cosine. BatchNorms go by the batch and renew their
    statistics; a batch that gives one a single value per channel is left out. Dropout is off. A float16 network is
    trained in float32.

    Parameters
    ----------
    net, merged, ends, coefficients, device
        As for :func:`fedrebasin.repair`. Parameters of ``net`` that require no gradient stay as merged; where none
        requires one, as in a network for inference, all are trained.
    calibration : iterable of batches
        Inputs, no labels; batches of about 100 suit. Classes lie along axis 1 of the network's (first) output.
    epochs : int
        Passes over the data. Where their steps are so few that BatchNorms keep over a fiftieth of the merge's
        statistics, one more pass renews them as :func:`fedrebasin.reset_batchnorm` does.
    lr : float
        Adam's rate at the start.
    reread : bool
        By default the data is read once and held in memory, and the ends answer once. True: the data is read in every
        epoch, in its own order, and the ends answer what was read: what a DataLoader shuffles and augments is new each
        time, and many epochs pay.
    seed : int
        Of the order of the batches that are held: equal seeds give equal results.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``merged``.

    Raises
    ------
    CalibrationError
        If the data is empty, can be read only once, or holds no batch that BatchNorms can go by, or a loss is not
        finite.
    RebasinError
        If coefficients do not fit, ``epochs`` is below 1, ``lr`` not positive, or the outputs are no logits of classes.

    Warns
    -----
    UserWarning
        If there are fewer than 100 examples.

    References
    ----------
    Lin, Kong, Stich, Jaggi (NeurIPS 2020), "Ensemble distillation for robust model fusion in federated learning";
    for ``reread`` Beyer et al. (CVPR 2022), "Knowledge distillation: a good teacher is patient and consistent".

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
    model, found, weights = begin(net, merged, ends, calibration, coefficients, device)
    batches: Iterable[Any] = found
    if any(tensor.dtype == torch.float16 for tensor in model.parameters()):
        model.float()  # in float16 Adam's squares vanish
        batches = _Wide(batches)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        for parameter in model.parameters():
            parameter.requires_grad_(wide_type(parameter) is not None)
    lesson = _Reread(model, ends, weights, batches) if reread else _Held(model, ends, weights, batches, seed)
    warn_of_few(lesson.examples, "examples are few for distill", stacklevel=4)
    load(model, merged)
    for module in model.modules():
        module.train(isinstance(module, _BatchNorm))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * lesson.steps)
    taken = 0
    with torch.enable_grad():
        for _ in range(epochs):
            for (args, kwargs), goal in lesson.epoch():
                optimizer.zero_grad()
                try:
                    loss = -(goal * _logits(model, args, kwargs).log_softmax(1)).sum(1).mean()
                except ValueError as error:
                    check_too_small(error)
                else:
                    if not bool(loss.isfinite()):
                        raise CalibrationError(f"distill: the loss became {loss.item()}; check the inputs, or lower lr")
                    torch.autograd.backward(loss)
                    taken += 1
                optimizer.step()  # without gradients nothing is done
                schedule.step()
    # too few steps leave statistics of a network that is no more; where they forgot it, the average is the newest
    if any(_kept(norm, taken) > _STALE for norm in norms_with_statistics(model)):
        renew_statistics(model, norms_with_statistics(model), lesson.inputs())
    result = extract(model, merged)
    return {name: merged[name].clone() if wide_type(x) is None else x for name, x in result.items()}


def _kept(norm: _BatchNorm, steps: int) -> float:
    """The share that what was before the steps has in a running average; a cumulative one (None) forgets nothing.

    >>> _kept(nn.BatchNorm1d(2, momentum=0.5), 3), _kept(nn.BatchNorm1d(2, momentum=None), 3)
    (0.125, 1.0)
    """
    return 1.0 if norm.momentum is None else float((1 - norm.momentum) ** steps)


class _Wide:
    """Batches whose float16 numbers are float32."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.float16 else x, batch)


class _Held:
    """Batches that are held in memory with their goals, each epoch in another order."""

    def __init__(
        self,
        model: nn.Module,
        ends: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        batches: Iterable[Any],
        seed: int,
    ) -> None:
        self._inputs = [(args, kwargs) for args, kwargs, _ in batches]
        self._goals = _goals(model, ends, weights, self._inputs)
        self._generator = generator_of(seed)
        self.steps, self.examples = len(self._inputs), sum(map(examples_in, self._inputs))

    def inputs(self) -> Iterable[Batch]:
        return self._inputs

    def epoch(self) -> Iterator[tuple[Batch, Tensor]]:
        for place in torch.randperm(self.steps, generator=self._generator, device="cpu").tolist():
            yield self._inputs[place], self._goals[place]


class _Reread:
    """Batches that are read in every epoch, and answered by the ends as they come."""

    def __init__(
        self, model: nn.Module, ends: Sequence[Mapping[str, Tensor]], weights: Sequence[float], batches: Iterable[Any]
    ) -> None:
        self._teacher, self._ends, self._weights, self._batches = deep_copy(model).eval(), ends, weights, batches
        sizes = [examples_in((args, kwargs)) for args, kwargs, _ in batches]
        self.steps, self.examples = len(sizes), sum(sizes)

    def inputs(self) -> Iterable[Batch]:
        return ((args, kwargs) for args, kwargs, _ in self._batches)

    def epoch(self) -> Iterator[tuple[Batch, Tensor]]:
        for args, kwargs in self.inputs():
            (goal,) = _goals(self._teacher, self._ends, self._weights, [(args, kwargs)])
            yield (args, kwargs), goal


def _logits(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    args, kwargs = copied((args, kwargs))
    found = tensors(model(*args, **kwargs))
    if not found or found[0].ndim < 2 or found[0].shape[1] < 2:
        came = f"outputs of shape {tuple(found[0].shape)}" if found else "no floating output"
        raise RebasinError(
            f"net: distill needs logits of two or more classes on axis 1; got {came}; "
            "for numbers, or one logit, use least_squares or repair"
        )
    return found[0]


@torch.no_grad()
def _goals(
    model: nn.Module, ends: Sequence[Mapping[str, Tensor]], weights: Sequence[float], held: Sequence[Any]
) -> list[Tensor]:
    goals: list[Tensor] = []
    for end, weight in zip(ends, weights, strict=True):
        if not weight:
            continue
        load(model, end)
        said = [weight * _logits(model, args, kwargs).softmax(1) for args, kwargs in held]
        goals = [a + b for a, b in zip(goals, said, strict=True)] if goals else said
    return goals
