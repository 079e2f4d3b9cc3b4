"""federated_least_squares: every layer of the merged network from sums that nodes form on their own data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedrebasin.corrections.first_uses import read_until
from fedrebasin.corrections.label_prior import log_prior
from fedrebasin.corrections.layers import Layer, Norm, Step
from fedrebasin.corrections.least_squares import layer_equations, refresh_norm, step_moments, steps_of
from fedrebasin.corrections.linear_maps import LinearMap, read_map, write_map
from fedrebasin.corrections.moments import Moments
from fedrebasin.corrections.noised_sums import read_noise, solve_noised
from fedrebasin.corrections.normal_equations import NormalEquations, pack, unpack
from fedrebasin.corrections.output_goals import output_of
from fedrebasin.corrections.passes import Memory, Runner
from fedrebasin.corrections.privacy import ClippedMoments
from fedrebasin.corrections.private_sums import ClippedEquations
from fedrebasin.corrections.queries import FLOOR, About, Answer, Case, Correction, Node, Query, check_tensors, rms_of
from fedrebasin.corrections.solution import solve_layer
from fedrebasin.corrections.working import extract, warn_of_few
from fedrebasin.errors import RebasinError

KIND = "equations"
Equations = tuple[NormalEquations, NormalEquations]


def federated_least_squares(case: Case) -> Correction:
    """Make each layer's pre-activations, on every node's data, those of that node's end.

    Layer after layer in forward order: on node k's data, with ``x`` the input that the merged network, corrected so
    far, gives the layer ``(W, b)``, and ``z_k`` the pre-activation of node k's own aligned end for the same example,
    the layer becomes ``(W + D, b + d)`` with the smallest

        mean |z_k - (W + D) x - (b + d)|^2 + ridge * s * |D|^2

    over the samples of all nodes, ``s`` the mean variance of ``x``. Every sample counts once: a node that answers with
    more of them weighs more, and the coefficients of the merge do not enter. It is the solution on the pooled data,
    each example's goal from the end of the node that holds it, to rounding. Layers and BatchNorms as for
    :func:`fedrebasin.least_squares`, the last layer included.

    One query round a layer (and one for each BatchNorm that stands alone). For a layer with ``m`` inputs and ``n``
    outputs a node sends ``m (m + 1) / 2 + m n + m + n`` numbers of float64, twice if the ridge is chosen: on the
    examples to fit, and on every fifth, by which the server takes the best of ``RIDGES``.

    Parameters
    ----------
    case : Case

    Yields
    ------
    Query
        Read into a pair of :class:`NormalEquations`, to fit and held out, Gram matrices packed, or into moments.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``case.merged``.

    Raises
    ------
    RebasinError
        If no layer can be solved, or ``label_prior`` is asked for and the last layer does not give the logits.

    Warns
    -----
    UserWarning
        If all nodes together have fewer than 100 samples of a layer.

    References
    ----------
    Nasery, Hayase, Koh, Oh (2024), "PLeaS", arXiv 2407.02447, for the layer-wise solution on one data set.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> state = net.state_dict()
    >>> query = next(federated_least_squares(Case(net, state, [state, state], [0.5, 0.5], torch.randn(2, 4))))
    >>> query.about["step"], query.end_names
    ('0.weight', ('0.weight', '0.bias'))
    """
    model, ridge = case.model(), case.options.ridge
    steps, uses = steps_of(model, case.example(), "federated least squares"), case.uses(model)
    if case.options.label_prior and not _gives_the_output(case, model, steps):
        raise RebasinError(
            "label_prior: expected a network whose last linear layer gives the logits; another part comes behind it"
        )
    samples: list[int] = []
    for step in steps:
        state = extract(model, case.merged)
        names = read_until(uses, _names(state, step), state)
        part = {name: state[name] for name in names}
        if isinstance(step, Norm):
            read, size = _moments_reader(len(state[step.key])), lambda one: rms_of([one])
            measured: dict[int, Moments] = yield Query(KIND, {"step": step.key}, part, (), read, size)
            moments = Moments()
            for found in measured.values():
                moments.join(found)
            refresh_norm(model, step, moments)
            continue
        start = read_map(model, step)
        last = case.options.label_prior and step is steps[-1]
        about: About = {"step": step.weight, "split": ridge is None, "label-prior": last}
        answers: dict[int, Equations] = yield Query(
            KIND, about, part, names, _reader(start, split=ridge is None), _size
        )
        fit, check = NormalEquations(), NormalEquations()
        for own_fit, own_check in answers.values():
            fit, check = fit + own_fit, check + own_check
        samples.append(fit.count + check.count)
        for sums in (fit, check):  # packed until here: the nodes' matrices are never unpacked side by side
            sums.gram = unpack(sums.gram, len(start.matrix.T)) if sums.count else sums.gram
        if fit.noise[0] or check.noise[0]:
            shifts = step.bias is not None or step.norm is not None
            total, D, d = solve_noised(fit, check, ridge, intercept=shifts)
            write_map(model, step, LinearMap(start.matrix + D, start.shift + d), total.mean, total.covariance)
        else:
            solve_layer(model, step, fit, check, ridge)
    text = "samples of a layer, of all nodes, are few for federated least squares"
    warn_of_few(min(samples), text, name="data", stacklevel=6)
    return extract(model, case.merged)


def measure(about: About, node: Node) -> Answer:
    """What a node answers: its sums for one layer, or the moments of one BatchNorm's input."""
    ours, batches = node.model(node.merged), node.data()
    steps = steps_of(ours, batches, "federated least squares")
    index = next((place for place, step in enumerate(steps) if step.key == about["step"]), None)
    if index is None:
        raise RebasinError(f"model: the server asks about {about['step']!r}, which is no layer of this node's network")
    step, source = steps[index], ((args, kwargs) for args, kwargs, _ in batches)
    runner = Runner(ours, steps, Memory(0), keep=False)
    if isinstance(step, Norm):
        moments = step_moments(runner, index, step, source, ClippedMoments.maker(node.privacy))
        moments = moments.release() if isinstance(moments, ClippedMoments) else moments
        return {"count": torch.tensor(moments.count, device="cpu"), "mean": moments.mean, "squares": moments.squares}
    theirs = Runner(node.model(node.end), steps, Memory(0), keep=False)
    split, start = bool(about["split"]), read_map(ours, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few examples: those of all nodes count
        found = layer_equations(runner, [theirs], [1.0], index, step, source, split=split, privacy=node.privacy)
    for sums in found:
        if isinstance(sums, ClippedEquations):
            sums.release()
    if about["label-prior"]:
        prior = log_prior(node, len(start.shift)).to(start.shift.device)
        found = (found[0].lower_goals(prior), found[1].lower_goals(prior))
    answer: Answer = {}
    for part, sums in zip(("fit", "check"), found, strict=True):
        if part == "check" and not sums.count:
            continue
        answer[f"{part}.count"], answer[f"{part}.gram"] = torch.tensor(sums.count, device="cpu"), pack(sums.gram)
        answer |= {f"{part}.cross": sums.cross, f"{part}.x": sums.x, f"{part}.e": sums.e}
        if sums.noise[0]:
            answer[f"{part}.noise"] = torch.tensor(sums.noise, dtype=torch.float64, device="cpu")
    return answer


def count_releases(about: About) -> int:
    """How many noised vectors an answer holds: those of the layer, and the label shares.

    >>> count_releases({"step": "0.weight", "split": True, "label-prior": True})
    2
    """
    return 1 + bool(about.get("label-prior"))


def _reader(start: LinearMap, *, split: bool) -> Callable[[Answer], Equations]:
    outputs, inputs = start.matrix.shape
    device = start.matrix.device
    shapes = {"count": (), "gram": (inputs * (inputs + 1) // 2,), "cross": (outputs, inputs), "x": (inputs,)}
    shapes["e"] = (outputs,)
    places = _diagonal(inputs).to(device)

    def read(answer: Answer) -> Equations:
        found = [NormalEquations(), NormalEquations()]
        for sums, part in zip(found, ("fit", "check"), strict=True):
            if part == "check" and not (split and "check.count" in answer):
                continue
            check_tensors(answer, {f"{part}.{name}": shape for name, shape in shapes.items()})
            sums.count, sums.noise = int(answer[f"{part}.count"]), read_noise(answer, f"{part}.noise")
            for name in ("gram", "cross", "x", "e"):
                setattr(sums, name, answer[f"{part}.{name}"].to(device))
            diagonal = sums.gram[places]
            # Cauchy and Schwarz, with room for products in single precision
            impossible = not sums.noise[0] and bool((sums.x.square() > 1.01 * sums.count * diagonal + 1e-6).any())
            if sums.count < 1 or impossible:
                raise RebasinError(f"{part!r} sums that no inputs have")
        return found[0], found[1]

    return read


def _size(found: Equations) -> float:
    """The largest of what the sums say of inputs and goals, as root mean squares; Gram matrices are packed."""
    sums, inputs = found[0], len(found[0].x)
    rms = math.sqrt(max(0.0, float(sums.gram[_diagonal(inputs).to(sums.gram.device)].mean())) / sums.count)
    products = float(sums.cross.square().mean().sqrt()) / sums.count
    goals = float(sums.e.square().mean().sqrt()) / sums.count
    return max(rms, goals, products / max(rms, FLOOR))


def _diagonal(size: int) -> Tensor:
    """Where the diagonal of a packed matrix lies."""
    return torch.tensor([row * size - row * (row - 1) // 2 for row in range(size)], device="cpu")


def _moments_reader(size: int) -> Callable[[Answer], Moments]:
    def read(answer: Answer) -> Moments:
        check_tensors(answer, {"count": (), "mean": (size,), "squares": (size,)})
        if int(answer["count"]) < 1 or bool((answer["squares"] < 0).any()):
            raise RebasinError("moments without observations, or with a negative sum of squares")
        return Moments.of(int(answer["count"]), answer["mean"], answer["squares"])

    return read


def _names(state: dict[str, Tensor], step: Step) -> list[str]:
    """Keys of a step's own tensors, and of the BatchNorm's behind it."""
    own = [] if isinstance(step, Norm) else [step.weight, *([step.bias] if step.bias else [])]
    prefix = None if step.norm is None else (f"{step.norm}." if step.norm else "")
    norm = [name for name in state if prefix is not None and name.rpartition(".")[0] == prefix.rstrip(".")]
    return own + norm


def _gives_the_output(case: Case, model: nn.Module, steps: list[Step]) -> bool:
    args, kwargs, _ = next(iter(case.example()))
    if not isinstance(steps[-1], Layer) or steps[-1].norm is not None:
        return False
    output = output_of(model, args, kwargs)
    last = Runner(model, steps, Memory(0), keep=False).output(len(steps) - 1, 0, (args, kwargs))
    return isinstance(output, Tensor) and output.shape == last.shape and bool(torch.allclose(output, last))
