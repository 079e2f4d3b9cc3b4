"""regmean: every layer from the ends' own layers and the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.coefficients import single
from fedrebasin.corrections.calls import examples_in
from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.least_squares import steps_of
from fedrebasin.corrections.linear_maps import LinearMap, chunks, columns, read_map, write_map
from fedrebasin.corrections.normal_equations import InputSums, NormalEquations
from fedrebasin.corrections.passes import Memory, Runner
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.corrections.private_sums import ClippedEquations, new_equations
from fedrebasin.corrections.shifted_gram import unfolded_gram
from fedrebasin.corrections.working import batches_for, begin, extract, warn_of_few, working_copy
from fedrebasin.errors import CalibrationError, RebasinError

#: weight's key -> Gram matrix of the layer's inputs with a row of ones below them
Grams = dict[str, Tensor]


@torch.inference_mode(False)
def regmean(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    grams: Sequence[Mapping[str, Tensor]] | None = None,
    off_diagonal: float = 0.9,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Make each layer agree with every end's layer on that end's own inputs to it.

    ``W = (sum_k c_k G_k W_k) (sum_k c_k G_k)^-1`` with ``G_k`` the mean of ``x x^T`` over end k's inputs of it, a
    1 at the end of each ``x`` for the bias. Layers and BatchNorms as for :func:`least_squares`; what it leaves averaged
    stays so here. One pass for each end, none through the merged network.

    Parameters
    ----------
    net, merged, ends, coefficients, device
        As for :func:`least_squares`.
    calibration : iterable of batches
        Inputs, no labels; of the first batch alone, to find the layers, if ``grams`` are given.
    grams : sequence of dict, optional
        What :func:`input_grams` gives for each end on data of its own, in the order of the aligned ends' units.
        Coefficients in proportion to the numbers of samples make it the paper's sum over samples.
    off_diagonal : float
        In [0, 1]: factor of what is off the diagonals.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``merged``.

    Raises
    ------
    CalibrationError
        If the data is empty, can be read only once, or activations are not finite.
    RebasinError
        If coefficients, ``grams`` or ``off_diagonal`` do not fit, an end is not finite, or no layer can be solved.

    Warns
    -----
    UserWarning
        If a layer has fewer than 100 samples, those of all ``grams`` together.

    References
    ----------
    Jin, Ren, Preotiuc-Pietro, Cheng (ICLR 2023), "Dataless knowledge fusion by merging weights of language models",
    arXiv 2212.09849.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ends = [net.state_dict(), net.state_dict()]
    >>> list(regmean(net, net.state_dict(), ends, [torch.randn(200, 4)]))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if not 0 <= off_diagonal <= 1:
        raise RebasinError(f"off_diagonal: expected a number in [0, 1]; got {off_diagonal}")
    model, batches, weights = begin(net, merged, ends, calibration, coefficients, device)
    if grams is not None and len(grams) != len(ends):
        raise RebasinError(f"grams: expected {len(ends)}, one for each end; got {len(grams)}")
    layers = [step for step in steps_of(model, batches, "regmean") if isinstance(step, Layer)]
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    samples: dict[str, float] = {}
    for place, (end, weight) in enumerate(zip(ends, weights, strict=True)):
        if not weight:
            continue
        one = working_copy(net, end, batches.device)
        found = input_grams(net, end, calibration, device=batches.device) if grams is None else grams[place]
        for layer in layers:
            map_ = read_map(one, layer)
            own = torch.cat([map_.matrix, map_.shift.unsqueeze(1)], 1)
            if not bool(own.isfinite().all()):
                raise RebasinError(
                    f"ends[{place}]: {layer.weight!r}, its bias or its BatchNorm holds a NaN or an infinity; leave "
                    "this end out"
                )
            gram = _gram_of(found, layer, own.shape[1], place).to(own.device)
            key, count = layer.weight, float(gram[-1, -1])
            samples[key] = count if grams is None else samples.get(key, 0.0) + count
            gram = weight * gram / gram[-1, -1]
            shrunk = off_diagonal * gram + (1 - off_diagonal) * gram.diagonal().diag()
            whole[key] = whole.get(key, torch.zeros_like(gram)) + gram
            left[key] = left.get(key, torch.zeros_like(own)) + own @ shrunk
            right[key] = right.get(key, torch.zeros_like(gram)) + shrunk
    name = "calibration" if grams is None else "grams"
    warn_of_few(round(min(samples.values())), "samples of a layer are few for regmean", name=name, stacklevel=4)
    for layer in layers:
        start = read_map(model, layer)
        W = _divide(left[layer.weight], right[layer.weight], torch.cat([start.matrix, start.shift.unsqueeze(1)], 1))
        mean, gram = whole[layer.weight][:-1, -1], whole[layer.weight][:-1, :-1]
        write_map(model, layer, LinearMap(W[:, :-1], W[:, -1]), mean, gram - torch.outer(mean, mean))
    return extract(model, merged)


@torch.inference_mode(False)
def input_grams(
    net: nn.Module,
    state: Mapping[str, Tensor],
    calibration: Iterable[Any],
    *,
    device: torch.device | str | None = None,
) -> Grams:
    """Gram matrices of the inputs of every layer that :func:`regmean` solves, as sums over samples.

    Parameters
    ----------
    net, state, calibration, device
        As for :func:`least_squares`; ``state`` is one end.

    Returns
    -------
    dict of str to Tensor, float64 (m + 1, m + 1)
        By the weight's key; ``m`` is in * kernel, the last row and column belong to the 1 of the bias, and the last
        entry is the number of samples.

    Examples
    --------
    >>> net = nn.Linear(2, 1)
    >>> input_grams(net, net.state_dict(), [torch.tensor([[1.0, 2.0]])])["weight"]
    tensor([[1., 2., 1.],
            [2., 4., 2.],
            [1., 2., 1.]], dtype=torch.float64)
    """
    found = {name: with_ones(one) for name, one in input_sums(net, state, calibration, device=device).items()}
    odd = next((name for name, gram in found.items() if not bool(gram.isfinite().all())), None)
    if odd is not None:
        raise CalibrationError(
            f"calibration: the activations at {odd!r} hold a NaN or an infinity; check the models and the inputs"
        )
    return found


def input_sums(
    net: nn.Module,
    state: Mapping[str, Tensor],
    calibration: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    privacy: Privacy | None = None,
) -> dict[str, NormalEquations]:
    """Sums over the inputs of every layer, by its weight's key; with ``privacy`` clipped, and not noised yet."""
    model = working_copy(net, state, device)
    batches = batches_for(net, state, calibration, device)
    steps = steps_of(model, batches, "regmean")
    sums = {step.weight: new_equations(privacy) for step in steps if isinstance(step, Layer)}
    for args, kwargs, _ in batches:
        runner = Runner(model, steps, Memory(2**62), keep=True)  # one batch's outputs: a pass costs a layer
        for index, step in enumerate(steps):
            if not isinstance(step, Layer):
                continue
            z = runner.output(index, 0, (args, kwargs))
            x = single(runner.last_input)
            kernel = tuple(model.state_dict()[step.weight].shape[2:])
            places = z.shape[2:] if kernel else ()
            for part in chunks(step, x, kernel):
                X, own = columns(step, x[part], kernel), sums[step.weight]
                if isinstance(own, ClippedEquations):
                    examples = examples_in((args, kwargs))  # not always the first axis of the layer's input
                    own.add_clipped(X, None, positions=X.shape[1] / len(x[part]) * len(x) / examples)
                else:
                    own.add_inputs(X, unfolded_gram(step, X, kernel, places))
    return sums


def with_ones(sums: InputSums) -> Tensor:
    """Gram matrix of inputs with a 1 at the end of each."""
    x = sums.x.unsqueeze(1)
    return torch.cat([torch.cat([sums.gram, x], 1), torch.cat([x.T, x.new_full((1, 1), sums.count)], 1)])


def _gram_of(found: Mapping[str, Tensor], layer: Layer, size: int, place: int) -> Tensor:
    gram = found.get(layer.weight)
    if gram is None or gram.shape != (size, size):
        came = "none" if gram is None else f"one of {tuple(gram.shape)}"
        raise RebasinError(
            f"grams[{place}]: expected a matrix of {(size, size)} for {layer.weight!r}; got {came}; use input_grams"
        )
    if not bool(gram.isfinite().all()) or not float(gram[-1, -1]) > 0:
        raise RebasinError(
            f"grams[{place}]: expected finite sums of one sample or more for {layer.weight!r}; got others; leave this "
            "end out, or check its inputs"
        )
    return gram.double()


def _divide(left: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """``left @ right^-1``; along directions without inputs, ``start``."""
    values, vectors = torch.linalg.eigh(right)
    large = values > 1e-10 * values.max()
    inverse = torch.where(large, 1 / torch.where(large, values, 1.0), 0.0)
    solved: Tensor = start + ((left - start @ right) @ vectors * inverse) @ vectors.T
    return solved
