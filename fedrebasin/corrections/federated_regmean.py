"""federated_regmean: RegMean from Gram matrices that nodes form on their own data, in one query round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedrebasin.corrections.first_uses import read_until
from fedrebasin.corrections.gram_sketch import Expanded, Sketch, check_gram, expand, rank_within, sketch
from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.least_squares import steps_of
from fedrebasin.corrections.linear_maps import read_map
from fedrebasin.corrections.queries import About, Answer, Case, Correction, Node, Query, check_tensors
from fedrebasin.corrections.regmean import input_grams, regmean

KIND = "grams"


def federated_regmean(case: Case) -> Correction:
    """Make each layer agree with every end's layer on that end's own inputs to it, of its own node's data.

    :func:`fedrebasin.regmean` with the Gram matrices of the nodes: ``W = (sum_k c_k W_k G_k) (sum_k c_k G_k)^-1`` with
    ``G_k`` the mean of ``x x^T`` over node k's inputs of the layer, off-diagonals times ``options.off_diagonal``.
    The server sends each node its own aligned end, so that the matrices come in the order of the aligned units.

    One query round. A layer with ``m`` inputs costs ``(m + 1) (m + 2) / 2`` numbers of float64. Where that is over
    ``options.gram_limit`` bytes a node sends means, variances and as many leading directions as fit
    (``gram_sketch.py``); it holds the whole matrix meanwhile.

    Parameters
    ----------
    case : Case

    Yields
    ------
    Query
        Read into the matrices by the weight's key.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``case.merged``.

    Raises
    ------
    RebasinError
        If no layer can be solved.

    References
    ----------
    Jin, Ren, Preotiuc-Pietro, Cheng (ICLR 2023), arXiv 2212.09849.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(4, 2)
    >>> state = net.state_dict()
    >>> query = next(federated_regmean(Case(net, state, [state, state], [0.5, 0.5], torch.randn(2, 4))))
    >>> query.merged, query.end_names
    ({}, ('weight', 'bias'))
    """
    model, limit = case.model(), case.options.gram_limit
    layers = [step for step in steps_of(model, case.example(), "federated regmean") if isinstance(step, Layer)]
    sizes = {layer.weight: read_map(model, layer).matrix.shape[1] + 1 for layer in layers}
    last = layers[-1]
    names = read_until(case.uses(model), [last.weight], dict(case.merged))
    answers: dict[int, Expanded] = yield Query(
        KIND, {"limit": limit}, {}, names, _reader(sizes, limit), lambda grams: max(map(_rms, grams.values()))
    )
    shares = case.shares(answers)
    return regmean(
        *(case.net, case.merged, [case.ends[place] for place in answers], [_batch(case)]),
        coefficients=[shares[place] for place in answers],
        grams=[answers[place] for place in answers],
        off_diagonal=case.options.off_diagonal,
        device=case.device,
    )


def measure(about: About, node: Node) -> Answer:
    """What a node answers: the Gram matrices of its aligned end's layer inputs, whole or as sketches."""
    state = node.model(node.end).state_dict()
    found = input_grams(node.net, state, node.batches, device=node.device)
    limit = int(str(about["limit"]))
    return {
        f"{name}.{part}": tensor
        for name, gram in found.items()
        for part, tensor in sketch(gram, rank_within(len(gram), limit)).items()
    }


def _reader(sizes: dict[str, int], limit: int) -> Callable[[Answer], Expanded]:
    def read(answer: Answer) -> Expanded:
        sketches: dict[str, Sketch] = {}
        for name, size in sizes.items():
            rank = rank_within(size, limit)
            shapes: dict[str, tuple[int, ...]] = {"gram": (size * (size + 1) // 2,)}
            if rank is not None:
                m = size - 1
                shapes = {"count": (), "mean": (m,), "rest": (m,), "directions": (m, min(rank, m))}
            check_tensors(answer, {f"{name}.{part}": shape for part, shape in shapes.items()})
            sketches[name] = {part: answer[f"{name}.{part}"] for part in shapes}
            check_gram(expand(sketches[name], size))
        return Expanded(sketches, sizes)

    return read


def _rms(gram: Tensor) -> float:
    return float((gram.diagonal()[:-1].mean() / gram[-1, -1]).sqrt())


def _batch(case: Case) -> Any:
    args, kwargs, _ = next(iter(case.example()))
    return kwargs or args
