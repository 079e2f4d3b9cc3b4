"""Straight-through matching: the permutations whose midpoint has the lowest loss, found by gradients."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.errors import RebasinError
from fedrebasin.matching.labelled import Loss, State
from fedrebasin.matching.midpoint import Midpoint, lowest_loss_matching
from fedrebasin.matching.result import Matching
from fedrebasin.matching.rounded import start_of
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms
from fedrebasin.spec import PermutationSpec

LOGGER = logging.getLogger("fedrebasin")


@torch.inference_mode(False)
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
        If a state dict, ``net`` or ``init`` does not fit the spec.
    CalibrationError
        If the data is empty, can be read only once or has no targets, or the start's loss is not finite.
    RebasinError
        If ``epochs``, ``lr`` or ``lam`` is out of range, weights are complex, or ``loss`` returns no scalar.

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
    midpoint = Midpoint(spec, net, reference, model, batches, loss=loss, lam=lam, device=device)
    first = weight_matching(spec, reference, model, seed=seed, device=device).perms if init is None else init
    start = start_of(spec, first)
    candidates = _trained(spec, midpoint, reference, model, start, epochs=epochs, lr=lr, device=device)
    return lowest_loss_matching(midpoint, reference, model, start, candidates, started)


def _trained(
    spec: PermutationSpec,
    midpoint: Midpoint,
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
