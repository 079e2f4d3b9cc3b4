"""Sinkhorn re-basin: gradient steps on soft permutations, for the weights' distance or for a loss on data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.errors import RebasinError
from fedrebasin.matching.doubly_stochastic import GRADIENTS
from fedrebasin.matching.labelled import Loss
from fedrebasin.matching.midpoint import Midpoint, lowest_loss_matching
from fedrebasin.matching.relaxed import Relaxed, best_corner, corner, no_logits, soften
from fedrebasin.matching.relaxed_problem import TOLERANCE, RelaxedProblem
from fedrebasin.matching.result import Matching
from fedrebasin.matching.rounded import best_matching, start_of
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import Perms
from fedrebasin.seeds import generator_of
from fedrebasin.spec import PermutationSpec

LOGGER = logging.getLogger("fedrebasin")

#: Size of the random part of X at the start: where by symmetry no gradient tells units apart, it does.
_NOISE = 1e-2


@torch.inference_mode(False)
def sinkhorn_matching(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    net: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    lam: float | None = 0.5,
    steps: int = 100,
    lr: float = 0.1,
    tau: float = 1.0,
    gradient: str = "implicit",
    iterations: int = 20,
    init: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Matching:
    """Permute ``model`` by gradient steps on soft permutations ``P = Sinkhorn(X / tau)``.

    Without data it maximises ``f(P) = sum_l <W_l^A, P_l W_l^B P_{l-1}^T>``, as :func:`weight_matching` does: at
    permutations that is to bring the weights as near as possible. With ``net``, ``batches`` and ``loss`` it minimises
    the loss of the network at ``(1 - lam) A + lam P B``, running statistics softly permuted too; one batch a step.
    After each step (with data: after each pass over the batches, and the last step) ``P`` is rounded by one assignment
    for each permutation, and the best that was seen, the start included, is kept.

    Parameters
    ----------
    spec : PermutationSpec
    reference, model : dict of str to Tensor
        State dicts of the spec's architecture, A and B; neither is changed.
    net : nn.Module, optional
        Of the architecture; its own weights are not used. It runs in evaluation mode.
    batches : iterable of (input, target), optional
        Read once for the start, and twice for each pass.
    loss : callable, optional
        ``loss(output, target)``, a mean over the batch.
    lam : float or None
        In (0, 1): where between the two the loss is taken. ``None`` draws it anew for each batch, uniformly; the loss
        by which the best is kept is then that of the midpoint.
    steps : int
        Of Adam, on X.
    lr : float
        Adam's step.
    tau : float
        The smaller, the harder P. Adam's steps do not depend on the gradient's size, so that halving tau acts like
        doubling ``lr``.
    gradient : {"implicit", "unrolled"}
        From the equations that P satisfies, or back through ``iterations`` passes over columns and rows, after which
        the columns' sums may still be far from one.
    iterations : int
        Of the unrolled gradient.
    init : dict of str to Tensor, optional
        Permutations to start near, and to end nowhere below. By default none are preferred without data, and with
        data weight matching's.
    seed : int
        Of the small random part of X, of ``lam=None``, and of weight matching for the start.
    device : str, optional
        Where products are taken and the network runs; by default where the model, with data the reference, is.

    Returns
    -------
    Matching
        Without data the objective is never below the start's, and a model that no step improves is kept as it is.
        With data ``measures`` holds ``"loss"``, never above ``"loss-before"``, that of the start; the objective is
        that of weight matching, so that methods can be compared, and may be lower than before.

    Raises
    ------
    SpecMismatchError
        If a state dict, ``init`` or ``net`` does not fit the spec, or without data a tied parameter holds a NaN or an
        infinity.
    CalibrationError
        If the data is empty, can be read only once or has no targets, or the start's loss is not finite.
    RebasinError
        If an option is out of range, some but not all of ``net``, ``batches`` and ``loss`` are given, weights are
        complex where they are, or ``loss`` returns no scalar.

    References
    ----------
    Guerrero Pena, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli (2023), "Re-basin via implicit Sinkhorn
    differentiation", with its costs L2, Mid (``lam=0.5``) and Rnd (``lam=None``). The exact rounding and keeping the
    best are ours; so is that L2 leaves out the norm of the softly permuted model, which is constant at permutations.

    Examples
    --------
    >>> from fedrebasin import permute, random_perms, trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = trace(net, (torch.randn(2, 4),))
    >>> moved = permute(spec, random_perms(spec, 1), net.state_dict())
    >>> matching = sinkhorn_matching(spec, net.state_dict(), moved)
    >>> bool((permute(spec, matching.perms, moved)["0.weight"] == net[0].weight).all())
    True
    """
    for name, value, fits, expected in (
        ("steps", steps, steps >= 1, "1 or more"),
        ("lr", lr, lr > 0, "a positive number"),
        ("tau", tau, tau > 0, "a positive number"),
        ("iterations", iterations, iterations >= 1, "1 or more"),
        ("gradient", gradient, gradient in GRADIENTS, f"one of {', '.join(GRADIENTS)}"),
        ("lam", lam, lam is None or 0 < lam < 1, "None, or a number between 0 and 1, both excluded"),
    ):
        if not fits:
            raise RebasinError(f"{name}: expected {expected}; got {value}")
    started = time.perf_counter()
    given = {"net": net, "batches": batches, "loss": loss}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise RebasinError(f"{missing[0]}: expected net, batches and loss together, or none of them; got None")
    make = partial(_Logits, spec, lr=lr, tau=tau, gradient=gradient, iterations=iterations, seed=seed)
    if net is None or batches is None or loss is None:
        problem = RelaxedProblem(spec, reference, model, device=device)
        start = start_of(spec, init)
        logits = make(problem.like, None if init is None else start)
        candidates = _ascend(problem, start, logits, steps)
        return best_matching(problem, reference, model, start=start, candidates=candidates, started=started)
    spec.check_state(reference, "reference")
    spec.check_state(model, "model")
    midpoint = Midpoint(spec, net, reference, model, batches, loss=loss, lam=0.5 if lam is None else lam, device=device)
    nearest = weight_matching(spec, reference, model, seed=seed, device=device).perms if init is None else init
    start = start_of(spec, nearest)
    lams = generator_of(seed) if lam is None else None
    descent = _descend(midpoint, make(midpoint.like, start), steps, lams)
    return lowest_loss_matching(midpoint, reference, model, start, descent, started)


class _Logits:
    """X, the numbers that Sinkhorn's operator turns into soft permutations, and Adam's state for them."""

    def __init__(
        self,
        spec: PermutationSpec,
        like: Tensor,
        near: Perms | None,
        *,
        lr: float,
        tau: float,
        gradient: str,
        iterations: int,
        seed: int,
    ) -> None:
        self._spec, self._tau, self._gradient, self._iterations = spec, tau, gradient, iterations
        generator = generator_of(seed)
        self._X = {}
        for perm, zeros in no_logits(spec, like).items():
            self._X[perm] = (_NOISE * torch.randn(zeros.shape, generator=generator, device="cpu")).to(zeros)
        if near is not None:
            for perm, pattern in corner(spec, near, like).items():
                self._X[perm] += tau * math.log(pattern.shape[-1]) * pattern  # half of each unit stays
        for X in self._X.values():
            X.requires_grad_()
        self._optimizer = torch.optim.Adam(self._X.values(), lr) if self._X else None

    def soft(self) -> Relaxed:
        """``P``, differentiable in X."""
        scaled = {perm: X / self._tau for perm, X in self._X.items()}
        return soften(self._spec, scaled, gradient=self._gradient, iterations=self._iterations)

    def step(self, loss: Tensor) -> None:
        """One step down."""
        if self._optimizer is not None:
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()


@torch.enable_grad()
def _ascend(problem: RelaxedProblem, start: Perms, logits: _Logits, steps: int) -> Iterator[tuple[Perms, float]]:
    _, _, slope = problem.step(corner(problem.spec, start, problem.like))
    if slope <= TOLERANCE:
        return
    relaxed = logits.soft()
    for _ in range(steps):
        logits.step(-problem.value(relaxed))
        relaxed = logits.soft()
        perms = best_corner(problem.spec, relaxed)
        yield perms, float(problem.value(corner(problem.spec, perms, problem.like)))


@torch.enable_grad()
def _descend(midpoint: Midpoint, logits: _Logits, steps: int, lams: torch.Generator | None) -> Iterator[Perms]:
    taken = 0
    while taken < steps:
        for args, kwargs, target in midpoint.batches:
            lam = midpoint.lam if lams is None else float(torch.rand((), generator=lams, device="cpu"))
            value = midpoint.soft_loss(logits.soft(), lam, args, kwargs, target)
            if not bool(value.isfinite()):
                LOGGER.warning("sinkhorn matching: the loss became NaN or infinite; the best so far is kept")
                return
            logits.step(value)
            taken += 1
            if taken == steps:
                break
        yield best_corner(midpoint.spec, logits.soft())
