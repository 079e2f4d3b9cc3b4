"""Weight matching of two widths: block coordinate descent over rectangular assignments or transport plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedrebasin.errors import RebasinError
from fedrebasin.resizable import is_known
from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.fold import fold
from fedrebasin.widths.maps import WidthMatching
from fedrebasin.widths.problem import WidthProblem

UNMATCHED = ("pad", "fold", "transport")
_MAX_SWEEPS = 100
_TOLERANCE = 1e-9
#: A plan of uniform masses is an assignment of as many copies of each unit as make the numbers equal, up to this many.
_MOST_COPIES = 4096

Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def match_widths(
    reference_spec: PermutationSpec,
    model_spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    unmatched: str = "pad",
    fold_above: float = 0.9,
) -> WidthMatching:
    """Find which units of ``model`` are which of ``reference``, where hidden layers differ in width.

    Maximises, one permutation after the other, the inner product of the reference with the model made to fit, by
    rectangular assignments: every unit of the narrower layer gets one of the wider. It begins with the permutation of
    which most can be compared while the others are unknown, and sweeps until nothing gains.

    Parameters
    ----------
    reference_spec, model_spec : PermutationSpec
        Of one kind of network: the same tensors, with other numbers of hidden units.
    reference, model : dict of str to Tensor
        State dicts; neither is changed.
    unmatched : {"pad", "fold", "transport"}
        What becomes of the wider layer's other units. ``"pad"``: the model lacks them, or loses them.
        ``"fold"``: one that is written like a unit of the other network (cosine over ``fold_above``) shares it: what
        is read is divided among those that share, or added up. ``"transport"``: all units share, by the plan between
        uniform masses that maximises the same objective.
    fold_above : float

    Returns
    -------
    WidthMatching
        For :func:`resize`.

    Raises
    ------
    RebasinError
        If ``unmatched`` is unknown; if it is not ``"pad"`` and nobody knows how some op reads its weight; if weights
        are complex.
    SpecMismatchError
        If the networks are not of one kind, or a state dict does not fit or holds a NaN or an infinity.

    References
    ----------
    Singh and Jaggi (NeurIPS 2020), "Model Fusion via Optimal Transport"; the assignments are those of Ainsworth,
    Hayase, Srinivasa (ICLR 2023), "Git Re-Basin".

    Examples
    --------
    >>> wide, narrow = (torch.nn.Sequential(torch.nn.Linear(2, n), torch.nn.Linear(n, 1)) for n in (5, 3))
    >>> from fedrebasin import trace
    >>> specs = [trace(net, (torch.randn(2, 2),)) for net in (wide, narrow)]
    >>> match_widths(*specs, wide.state_dict(), narrow.state_dict()).present["0"].sum()
    tensor(3)
    """
    if unmatched not in UNMATCHED:
        raise RebasinError(f"unmatched: expected one of {', '.join(map(repr, UNMATCHED))}; got {unmatched!r}")
    problem = WidthProblem(reference_spec, model_spec, reference, model)
    unknown = [name for name in problem.reference if not is_known(reference_spec, name)]
    if unknown and unmatched != "pad":
        use = reference_spec.uses.get(unknown[0], "no op")
        raise RebasinError(
            f"unmatched={unmatched!r} needs to know which axis of {unknown[0]!r} is read, and it is used by {use}; "
            "take unmatched='pad'"
        )
    order = _descend(problem, _transport if unmatched == "transport" else _assign)
    objective = problem.objective()
    if unmatched == "fold":
        for perm in order:
            fold(problem, perm, above=fold_above)
    return WidthMatching(reference_spec, model_spec, problem.writes, problem.reads, objective)


def _descend(problem: WidthProblem, solve: Solve) -> list[str]:
    """Match all permutations, and again until nothing gains; returns the order of the first visits."""
    order = []
    for perm in problem.forward():
        problem.writes[perm], problem.reads[perm] = solve(*problem.similarity(perm))
        order.append(perm)
    for _ in range(_MAX_SWEEPS):
        gains = [_improve(problem, perm, solve) for perm in order]
        if not any(gains):
            break
    return order


def _improve(problem: WidthProblem, perm: str, solve: Solve) -> bool:
    written, read = problem.similarity(perm)
    old = problem.writes[perm], problem.reads[perm]
    new = solve(written, read)
    least = _TOLERANCE * float(written.abs().max() + read.abs().max()) * len(written)
    gain = float((written * (new[0] - old[0])).sum() + (read * (new[1] - old[1])).sum())
    if gain <= least:
        return False
    before = problem.objective(problem.tensors[perm]) if problem.is_quadratic(perm) else 0.0
    problem.writes[perm], problem.reads[perm] = new
    if problem.is_quadratic(perm) and problem.objective(problem.tensors[perm]) - before <= least:
        problem.writes[perm], problem.reads[perm] = old
        return False
    return True


def _assign(written: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """One unit of the wider layer for each of the narrower."""
    rows, columns = linear_sum_assignment((written + read).numpy(), maximize=True)
    matrix = torch.zeros_like(written)
    matrix[rows, columns] = 1.0
    return matrix, matrix


def _transport(written: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """The plan between uniform masses; written units are means, and what is read is divided."""
    first, second = written.shape
    copies = math.lcm(first, second)
    if copies > _MOST_COPIES:
        raise RebasinError(
            f"unmatched='transport': {first} and {second} units make {copies} copies, over {_MOST_COPIES}; "
            "take widths one of which divides the other, or unmatched='fold'"
        )
    gain = (first * written + second * read).repeat_interleave(copies // first, 0)
    rows, columns = linear_sum_assignment(gain.repeat_interleave(copies // second, 1).numpy(), maximize=True)
    plan = torch.zeros_like(written)
    where = torch.from_numpy(rows) // (copies // first), torch.from_numpy(columns) // (copies // second)
    plan.index_put_(where, torch.ones(copies, dtype=plan.dtype, device="cpu"), accumulate=True)
    return plan / (copies // first), plan / (copies // second)
