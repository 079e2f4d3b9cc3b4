"""least_squares: solve every layer of the merged network for the ends' mean pre-activations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin.batches import Batches
from fedrebasin.coefficients import single
from fedrebasin.corrections.calls import examples_in
from fedrebasin.corrections.layers import Layer, Norm, Step, find_steps
from fedrebasin.corrections.linear_maps import behind, chunks, columns, outputs, per_channel
from fedrebasin.corrections.moments import Moments
from fedrebasin.corrections.normal_equations import NormalEquations
from fedrebasin.corrections.output_goals import check_goals, check_last_layer, logits_of_mean_probabilities
from fedrebasin.corrections.passes import Batch, Memory, Runner, hold
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.corrections.private_sums import ClippedEquations, new_equations
from fedrebasin.corrections.shifted_gram import unfolded_gram
from fedrebasin.corrections.solution import check_ridge, solve_layer
from fedrebasin.corrections.working import begin, extract, warn_of_few, working_copy
from fedrebasin.errors import RebasinError

LOGGER = logging.getLogger("fedrebasin")

#: One example in so many is held out.
_HELD = 5


@torch.inference_mode(False)
def least_squares(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    ridge: float | None = None,
    goals: str = "pre-activations",
    memory: int = 2**30,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Make each layer's pre-activations, on the merged network's own inputs, those of the ends on theirs.

    Layer after layer in forward order: with ``x`` the input that the merged network, corrected so far, gives the
    layer, and ``z = sum_k c_k z_k`` the average of the ends' pre-activations for the same calibration input, the
    layer becomes ``(W + D, b + d)`` with the smallest ``mean |z - (W + D) x - (b + d)|^2 + ridge * s * |D|^2``, ``s``
    the mean variance of ``x``. Closed form, no labels, no steps. The last layer is solved, too.

    Every linear and convolution layer that runs once is solved, however it is called; a BatchNorm right behind one is
    folded in (the pre-activation is what it gives) and gets the statistics of its input and an affine map that give
    the same; a BatchNorm elsewhere gets the statistics of its input. Other norms stay. Grouped and transposed
    convolutions, layers that run twice, tied weights, recurrent layers, and attention's ingoing projections of several
    tensors stay averaged: the log names them.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    merged : dict of str to Tensor
        The average of ``ends``, where every solution starts; it is not changed.
    ends : sequence of dict of str to Tensor
        The aligned state dicts.
    calibration : iterable of batches
        Inputs, no labels. Along the first axis lie examples. Shuffle data whose classes come in turn: every fifth
        example is held out, which would be one or two classes alone.
    coefficients : sequence of float, optional
        The merge's; equal by default.
    ridge : float, optional
        By default every layer takes that of ``solution.RIDGES`` which is best on every fifth example after a fit on the
        others, and is then fitted on all.
    goals : {"pre-activations", "probabilities"}
        What the last layer is solved for: the average of the ends' logits, or the logits of the average of their
        class probabilities (``output_goals.py``), which is the better ensemble where ends know different classes.
    memory : int
        Bytes that may be kept between passes, besides ``len(ends) + 1`` networks, a layer's normal equations and a
        batch: calibration inputs, and outputs of the layers that later ones read. With enough of it a layer costs one
        layer's computation, without it a pass up to that layer.
    device : str, optional
        Where the networks run; by default where ``merged`` is.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``merged``.

    Raises
    ------
    CalibrationError
        If the data is empty, can be read only once, or activations are not finite.
    RebasinError
        If coefficients do not fit, ``ridge`` or ``memory`` is negative, no layer can be solved, or probabilities are
        the goal and the network does not end in a linear layer.

    Warns
    -----
    UserWarning
        If there are fewer than 100 examples.

    References
    ----------
    Nasery, Hayase, Koh, Oh (2024), "PLeaS: Merging models with permutations and least squares", arXiv 2407.02447.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ends = [net.state_dict(), net.state_dict()]
    >>> list(least_squares(net, net.state_dict(), ends, [torch.randn(200, 4)]))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    check_ridge(ridge)
    budget = Memory(memory)
    model, batches, weights = begin(net, merged, ends, calibration, coefficients, device)
    steps = steps_of(model, batches, "least squares")
    check_goals(goals)
    if goals == "probabilities":
        check_last_layer("goals='probabilities'", model, steps, batches, instead="goals='pre-activations'")
    others = [working_copy(net, end, batches.device) for end, weight in zip(ends, weights, strict=True) if weight]
    shares = [[weight for weight in weights if weight]] * len(steps)
    solve_steps(model, others, steps, shares, batches, budget, ridge=ridge, goals=goals)
    return extract(model, merged)


def solve_steps(
    model: nn.Module,
    others: Sequence[nn.Module],
    steps: Sequence[Step],
    shares: Sequence[Sequence[float]],
    batches: Batches,
    memory: Memory,
    *,
    ridge: float | None = None,
    goals: str = "pre-activations",
) -> None:
    """Solve the layers of ``model`` one after the other; ``shares`` holds those of the ``others`` for each step."""
    held = hold(batches, memory)
    ours = Runner(model, steps, memory, keep=held is not None)
    theirs = [Runner(other, steps, memory, keep=held is not None) for other in others]
    for index, step in enumerate(steps):
        source: Iterable[Batch] = held if held is not None else ((args, kwargs) for args, kwargs, _ in batches)
        if isinstance(step, Norm):
            refresh_norm(model, step, step_moments(ours, index, step, source))
            continue
        probabilities = goals == "probabilities" and index == len(steps) - 1
        fit, check = layer_equations(
            ours, theirs, shares[index], index, step, source, split=ridge is None, probabilities=probabilities
        )
        solve_layer(model, step, fit, check, ridge)


def held_out_rows(seen: int, examples: Tensor) -> Tensor:
    """Which of these examples, after so many, are not fitted but choose the ridge: a mask, one in ``_HELD``."""
    return torch.arange(seen, seen + len(examples), device=examples.device) % _HELD == _HELD - 1


def steps_of(model: nn.Module, batches: Batches, method: str) -> list[Step]:
    """Layers and norms in order; the log names the weights that stay averaged."""
    args, kwargs, _ = next(iter(batches))
    steps, left = find_steps(model, args, kwargs)
    for name, reason in left.items():
        LOGGER.info("%s: %r stays averaged: %s", method, name, reason)
    if not any(isinstance(step, Layer) for step in steps):
        raise RebasinError(
            "net: expected a linear or convolution layer, not grouped and with a weight of its own; found none"
        )
    return steps


def layer_equations(
    ours: Runner,
    theirs: Sequence[Runner],
    shares: Sequence[float],
    index: int,
    layer: Layer,
    source: Iterable[Batch],
    *,
    split: bool,
    probabilities: bool = False,
    privacy: Privacy | None = None,
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations of what the layer lacks, on the examples to fit and on those held out; clipped for privacy."""
    kernel = tuple(ours.model.state_dict()[layer.weight].shape[2:])
    terms = [(runner, share, *behind(runner.model, layer)) for runner, share in zip(theirs, shares, strict=True)]
    scale, offset = behind(ours.model, layer)
    constant = sum((share * one for _, share, _, one in terms), -offset)
    fit, check = new_equations(privacy), new_equations(privacy)
    seen = 0
    for number, batch in enumerate(source):
        z = single(ours.output(index, number, batch, final=False))
        x, examples = single(ours.last_input), examples_in(batch)
        if probabilities:
            said = [single(one.output(index, number, batch)) for one in theirs]
            lacking = logits_of_mean_probabilities(said, shares).sub_(z)
        else:
            lacking = torch.addcmul(per_channel(layer, constant, z), z, per_channel(layer, -scale, z))
            for runner, share, factor, _ in terms:
                z = single(runner.output(index, number, batch))
                lacking.addcmul_(z, per_channel(layer, share * factor, z))
        if not kernel and x.ndim == 3 and len(x) != examples == x.shape[1]:
            x, lacking = x.transpose(0, 1), lacking.transpose(0, 1)  # attention has put positions first
        held = held_out_rows(seen, x)
        seen += len(x)
        for sums, mask in ((fit, ~held), (check, held)) if split else ((fit, held | True),):
            inputs, targets = x[mask], lacking[mask]
            for part in chunks(layer, inputs, kernel):
                X, E = columns(layer, inputs[part], kernel), outputs(layer, targets[part])
                if isinstance(sums, ClippedEquations):
                    sums.add_clipped(X, E, positions=X.shape[1] / len(inputs[part]) * len(x) / examples)
                else:
                    sums.add(X, E, unfolded_gram(layer, X, kernel, z.shape[2:] if kernel else ()))
    if index == 0:
        warn_of_few(seen, "examples are few for least squares", stacklevel=6)
    return fit, check


def step_moments(
    ours: Runner, index: int, norm: Norm, source: Iterable[Batch], make: Callable[[], Moments] = Moments
) -> Moments:
    """Moments of the input of a BatchNorm that stands alone."""
    moments = make()
    for number, batch in enumerate(source):
        moments.add(ours.input(index, number, batch), 1, examples_in(batch))
    moments.check(norm.norm)
    return moments


def refresh_norm(model: nn.Module, norm: Norm, moments: Moments) -> None:
    """Give a BatchNorm that stands alone the statistics of its input."""
    module = model.get_submodule(norm.norm)
    assert isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    module.running_mean.copy_(moments.mean)
    module.running_var.copy_(moments.std.square() * moments.count / max(1, moments.count - 1))
