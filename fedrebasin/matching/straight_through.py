"""Straight-through matching: the permutations whose midpoint has the lowest loss, found by gradients."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches
from fedrebasin.corrections.working import load, working_copy
from fedrebasin.errors import CalibrationError, RebasinError
from fedrebasin.matching.result import Matching, inner_product
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec

LOGGER = logging.getLogger("fedrebasin")

Loss = Callable[[Any, Any], Tensor]
State = Mapping[str, Tensor]


def straight_through_matching(
    spec: PermutationSpec,
    net: nn.Module,
    reference: State,
    model: State,
    batches: Iterable[Any],
    *,
    loss: Loss,
    epochs: int = 5,
    lr: float = 0.03,
    lam: float = 0.5,
    init: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Matching:
    """Permute ``model`` so that the loss at the midpoint with ``reference`` is low on labelled data.

    A shadow S of the reference's weights is trained. For each batch it is projected to the nearest permuted copy of
    the model, ``P = argmax_P <S, P B>``, by weight matching from the last P; the loss is taken at
    ``(1 - lam) A + lam P B``, and its gradient, which knows nothing of the projection, is applied to S. After each
    epoch the loss of the current P is measured over all batches, and the best P seen, the start's included, is kept.

    Parameters
    ----------
    spec : PermutationSpec
    net : nn.Module
        Of the architecture; its own weights are not used. It runs in evaluation mode.
    reference, model : dict of str to Tensor
        State dicts of the spec's architecture, A and B; neither is changed.
    batches : iterable of (input, target)
        Read twice in each epoch, and once for the start.
    loss : callable
        ``loss(output, target)``, a mean over the batch.
    epochs : int
        Passes over the data; one weight matching a batch.
    lr : float
        Adam's step for each tensor, as a share of the root mean square of the reference's entries.
    lam : float
        In (0, 1): where between the two the loss is taken.
    init : dict of str to Tensor, optional
        Permutations to start from; by default weight matching's.
    seed : int
        Of weight matching for the start.
    device : str, optional
        Where the network runs; by default where ``reference`` is.

    Returns
    -------
    Matching
        ``objective`` is that of weight matching, so that methods can be compared. ``measures`` holds ``"loss"`` and
        ``"loss-before"``, that of the start, over all batches; the first is never higher.

    Raises
    ------
    SpecMismatchError
        If a state dict or ``net`` does not fit the spec.
    CalibrationError
        If the data is empty, can be read only once or has no targets, or the start's loss is not finite.
    RebasinError
        If ``epochs``, ``lr`` or ``lam`` is out of range, or ``loss`` returns no scalar.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Section 3.3 and Algorithm 2. The steps in proportion to the
    tensors and the measure over all data are ours.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
    >>> spec, (a, b) = trace(nets[0], (torch.randn(2, 4),)), (net.state_dict() for net in nets)
    >>> data = [(torch.randn(20, 4), torch.randint(2, (20,))) for _ in range(3)]
    >>> matching = straight_through_matching(spec, nets[0], a, b, data, loss=nn.functional.cross_entropy)
    >>> matching.measures["loss"] <= matching.measures["loss-before"]
    True
    """
    for name, value, fits, expected in (
        ("epochs", epochs, epochs >= 1, "1 or more"),
        ("lr", lr, lr > 0, "a positive number"),
        ("lam", lam, 0 < lam < 1, "a number between 0 and 1, both excluded"),
    ):
        if not fits:
            raise RebasinError(f"{name}: expected {expected}; got {value}")
    started = time.perf_counter()
    spec.check_state(reference, "reference")
    spec.check_state(model, "model")
    midpoint = _Midpoint(spec, net, reference, model, batches, loss=loss, lam=lam, device=device)
    start = dict(weight_matching(spec, reference, model, seed=seed, device=device).perms if init is None else init)
    best, first = start, midpoint.mean_loss(start)
    lowest = first
    if not math.isfinite(first):
        raise CalibrationError(f"batches: the loss at the start is {first}; check the models, the inputs and the loss")
    for perms in _trained(spec, midpoint, reference, model, start, epochs=epochs, lr=lr, device=device):
        found = midpoint.mean_loss(perms)
        if found < lowest:
            best, lowest = perms, found
    before = inner_product(spec, reference, model)
    objective = inner_product(spec, reference, permute(spec, best, model))
    seconds = time.perf_counter() - started
    return Matching(best, objective, before, (before, objective), seconds, {"loss": lowest, "loss-before": first})


def _trained(
    spec: PermutationSpec,
    midpoint: _Midpoint,
    reference: State,
    model: State,
    perms: Perms,
    *,
    epochs: int,
    lr: float,
    device: torch.device | str | None,
) -> Iterator[Perms]:
    """The permutations after each epoch."""
    tied = {axis.name for axes in spec.tied.values() for axis in axes} - set(spec.buffers)
    shadow = {name: tensor.clone() for name, tensor in midpoint.reference.items() if name in tied}
    if not shadow:
        return
    scales = {name: float(tensor.square().mean().sqrt()) for name, tensor in shadow.items()}
    optimizer = torch.optim.Adam([{"params": [tensor], "lr": lr * scales[name]} for name, tensor in shadow.items()])
    for _ in range(epochs):
        for args, kwargs, target in midpoint.batches:
            perms = weight_matching(spec, {**reference, **shadow}, model, init=perms, device=device).perms
            if not midpoint.set_gradients(shadow, perms, args, kwargs, target):
                LOGGER.warning("straight-through matching: the loss became NaN or infinite; the best so far is kept")
                return
            optimizer.step()
        yield perms


class _Midpoint:
    """The network between the reference and the permuted model, in float32 or better."""

    def __init__(
        self,
        spec: PermutationSpec,
        net: nn.Module,
        reference: State,
        model: State,
        batches: Iterable[Any],
        *,
        loss: Loss,
        lam: float,
        device: torch.device | str | None,
    ) -> None:
        where = device if device is not None else next(iter(reference.values()), torch.zeros(0)).device
        self.batches = Batches(batches, inputs=spec.inputs, name="batches", device=where)
        self.reference, self._model = _prepare(reference, where), _prepare(model, where)
        self._spec, self._loss, self._lam = spec, loss, lam
        self._net = working_copy(net, reference, where)
        for parameter in self._net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def _put(self, perms: Perms) -> None:
        moved = permute(self._spec, perms, self._model)
        between = {
            name: torch.lerp(tensor, moved[name], self._lam) if tensor.is_floating_point() else tensor
            for name, tensor in self.reference.items()
        }
        load(self._net, between)

    def _loss_of(self, args: Any, kwargs: Any, target: Any) -> Tensor:
        if target is None:
            raise CalibrationError("batches: expected (input, target) pairs; got a batch without a target")
        value = self._loss(self._net(*args, **kwargs), target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RebasinError(f"loss: expected a scalar tensor from loss(output, target); got {got}")
        return value

    def set_gradients(self, shadow: State, perms: Perms, args: Any, kwargs: Any, target: Any) -> bool:
        """Put the gradient at the midpoint where the shadow's is read; False if the loss is not finite."""
        self._put(perms)
        self._net.zero_grad(set_to_none=True)
        value = self._loss_of(args, kwargs, target)
        value.backward()  # type: ignore[no-untyped-call]
        own = self._net.state_dict(keep_vars=True)
        for name, tensor in shadow.items():
            gradient = own[name].grad
            tensor.grad = None if gradient is None else gradient.to(tensor.dtype)
        return bool(value.isfinite())

    @torch.no_grad()
    def mean_loss(self, perms: Perms) -> float:
        """The mean loss over all examples."""
        self._put(perms)
        total, count = 0.0, 0
        for args, kwargs, target in self.batches:
            size = len(target) if isinstance(target, Tensor) and target.ndim else 1
            total += float(self._loss_of(args, kwargs, target)) * size
            count += size
        return total / count


def _prepare(state: State, where: torch.device | str) -> dict[str, Tensor]:
    narrow = (torch.float16, torch.bfloat16)
    return {
        name: tensor.detach().to(where, torch.float32 if tensor.dtype in narrow else tensor.dtype)
        for name, tensor in state.items()
    }
