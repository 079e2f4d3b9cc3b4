"""federated_regmean: RegMean from Gram matrices that nodes form on their own data, in one query round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedrebasin.corrections.first_uses import read_until
from fedrebasin.corrections.gram_sketch import Expanded, Sketch, check_gram, expand, rank_within, sketch
from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.least_squares import steps_of
from fedrebasin.corrections.linear_maps import read_map
from fedrebasin.corrections.noised_sums import read_noise, steadied
from fedrebasin.corrections.normal_equations import EXACT, Noise
from fedrebasin.corrections.private_sums import ClippedEquations
from fedrebasin.corrections.queries import About, Answer, Case, Correction, Node, Query, check_tensors
from fedrebasin.corrections.regmean import input_grams, input_sums, regmean, with_ones
from fedrebasin.errors import RebasinError

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
        KIND,
        {"limit": limit, "layers": list(sizes)},
        {},
        names,
        _reader(sizes, limit),
        lambda grams: max(map(_rms, grams.values())),
    )
    shares = case.shares(answers)
    return regmean(
        *(case.net, case.merged, [case.ends[place] for place in answers], [_batch(case)]),
        coefficients=[shares[place] for place in answers],
        grams=steadied(list(answers.values())),
        off_diagonal=case.options.off_diagonal,
        device=case.device,
    )


def measure(about: About, node: Node) -> Answer:
    """What a node answers: the Gram matrices of its aligned end's layer inputs, whole or as sketches."""
    state = node.model(node.end).state_dict()
    if node.privacy is None:
        found = input_grams(node.net, state, node.batches, device=node.device)
        noise = dict.fromkeys(found, EXACT)
    else:
        sums = input_sums(node.net, state, node.batches, device=node.device, privacy=node.privacy)
        released = {name: one.release() for name, one in sums.items() if isinstance(one, ClippedEquations)}
        found = {name: with_ones(one) for name, one in released.items()}
        noise = {name: one.noise for name, one in released.items()}
    asked, limit = about.get("layers"), int(str(about["limit"]))
    names = asked if isinstance(asked, list) else list(found)
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise RebasinError(f"model: the server asks about {missing!r}, which is no layer of this node's network")
    answer: Answer = {}
    for name in names:
        gram = found[name]
        answer |= {f"{name}.{part}": tensor for part, tensor in sketch(gram, rank_within(len(gram), limit)).items()}
        if noise[name][0]:
            answer[f"{name}.noise"] = torch.tensor(noise[name], dtype=torch.float64, device="cpu")
    return answer


def count_releases(about: About) -> int:
    """How many noised vectors an answer holds: one a layer.

    >>> count_releases({"limit": 0, "layers": ["0.weight", "2.weight"]})
    2
    """
    names = about.get("layers")
    if not isinstance(names, list):
        raise RebasinError("privacy: the query does not name its layers; update fedrebasin on the server")
    return len(names)


def _reader(sizes: dict[str, int], limit: int) -> Callable[[Answer], Expanded]:
    def read(answer: Answer) -> Expanded:
        sketches: dict[str, Sketch] = {}
        noise: dict[str, Noise] = {}
        for name, size in sizes.items():
            rank = rank_within(size, limit)
            shapes: dict[str, tuple[int, ...]] = {"gram": (size * (size + 1) // 2,)}
            if rank is not None:
                m = size - 1
                shapes = {"count": (), "mean": (m,), "rest": (m,), "directions": (m, min(rank, m))}
            check_tensors(answer, {f"{name}.{part}": shape for part, shape in shapes.items()})
            sketches[name] = {part: answer[f"{name}.{part}"] for part in shapes}
            noise[name] = read_noise(answer, f"{name}.noise")
            check_gram(expand(sketches[name], size), noised=noise[name][0] > 0)
        return Expanded(sketches, sizes, noise)

    return read


def _rms(gram: Tensor) -> float:
    return float((gram.diagonal()[:-1].mean() / gram[-1, -1]).clamp_min(0).sqrt())


def _batch(case: Case) -> Any:
    args, kwargs, _ = next(iter(case.example()))
    return kwargs or args
