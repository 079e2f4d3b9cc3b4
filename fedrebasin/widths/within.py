"""Units of one network that are redundant, merged: what writes them is averaged, what is read from them is summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError
from fedrebasin.resizable import check_can_resize
from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.maps import WidthMatching, resize
from fedrebasin.widths.problem import WidthProblem
from fedrebasin.widths.resized import Resized, with_units


def merge_units(
    spec: PermutationSpec,
    model: Mapping[str, Tensor],
    units: int | Mapping[str, int],
    *,
    homogeneous: bool = False,
) -> Resized:
    """Make a network narrower by merging the units that are written most alike, without data.

    Layer by layer in forward order, the two groups of units whose merger costs least are merged until the layer is as
    narrow as asked (Ward's rule). A group's unit is written by the mean of its units, each weighted by the square of
    what is read from it, which is the least-squares choice; what is read from them is added up. A merger costs the
    weighted squared distances from the mean. Units that are written alike, and units that nobody reads, cost nothing:
    the function stays. BatchNorm's running statistics are averaged alike.

    Parameters
    ----------
    spec : PermutationSpec
        Checked: only then a softmax or a mean over units is seen.
    model : dict of str to Tensor
        A state dict of the spec; it is not changed.
    units : int or dict of str to int
        The width wanted: of every hidden layer that is wider, or of some permutations.
    homogeneous : bool
        Every nonlinearity after these layers gives ``f(s x) = s f(x)`` for ``s > 0`` (ReLU, none; not tanh): then
        units that are written alike but for such a scale cost nothing either, nor do those written by zeros alone.

    Returns
    -------
    Resized
        Its one matching has the narrower network as reference.

    Raises
    ------
    RebasinError
        If ``units`` names no permutation or is not positive; as :func:`matched_averaging` for what cannot be resized;
        if ``homogeneous`` is asked for and a norm follows a layer.
    SpecMismatchError
        If the state dict does not fit, or holds a NaN or an infinity.

    References
    ----------
    Stoica et al. (ICLR 2024), "ZipIt! Merging models from different tasks without training": merging within a model,
    there by correlations over data, as :func:`fedrebasin.zip_trunks` does; Ward (1963), "Hierarchical grouping to
    optimize an objective function".

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> state = net.state_dict()
    >>> state["0.weight"][2], state["0.bias"][2] = state["0.weight"][0], state["0.bias"][0]
    >>> narrow = merge_units(trace(net, (torch.randn(2, 2),)), state, 2)
    >>> narrow.units, bool((narrow.state["2.weight"].sum() - state["2.weight"].sum()).abs() < 1e-6)
    ({'0': 2}, True)
    """
    check_can_resize(spec)
    spec.check_state(model)
    sizes = {perm: shape[0] for perm, shape in spec.perm_shapes.items()}
    wanted = dict.fromkeys(sizes, units) if isinstance(units, int) else dict(units)
    for perm, count in wanted.items():
        if perm not in sizes or count < 1:
            raise RebasinError(
                f"units: expected positive widths of some of {list(sizes)[:3]} ...; got {perm!r}: {count}"
            )
        if homogeneous:
            _check_no_norm(spec, perm)
    narrow = replace(spec, checked=False)
    maps = {perm: torch.eye(size, device="cpu").double() for perm, size in sizes.items()}
    writes, reads = dict(maps), dict(maps)
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in model.items()}
    for perm in _forward(spec, state):
        if perm in wanted and wanted[perm] < sizes[perm]:
            problem = WidthProblem(narrow, narrow, state, state)
            same = {other: torch.eye(shape[0], device="cpu").double() for other, shape in narrow.perm_shapes.items()}
            problem.writes, problem.reads = dict(same), dict(same)
            write, read = _groups(problem, perm, wanted[perm], homogeneous=homogeneous)
            before, narrow = narrow, with_units(narrow, {perm: len(write)})
            step = WidthMatching(narrow, before, {**same, perm: write}, {**same, perm: read})
            state = resize(step, state)
            writes[perm], reads[perm] = write, read
    result = {name: state[name].to(tensor) for name, tensor in model.items()}
    return Resized(narrow, result, [WidthMatching(narrow, spec, writes, reads)])


def _check_no_norm(spec: PermutationSpec, perm: str) -> None:
    for axis in spec.tied[perm]:
        use = spec.uses.get(axis.name, "")
        if "norm" in use.partition(" ")[0]:
            raise RebasinError(
                f"homogeneous: expected no norm on the units of {perm!r}; {axis.name!r} is used by {use}"
            )


def _forward(spec: PermutationSpec, state: Mapping[str, Tensor]) -> list[str]:
    """The permutations, those first whose layers read what is settled."""
    problem, order = WidthProblem(spec, spec, state, state), list[str]()
    for perm in problem.forward(reads=False):
        problem.writes[perm] = problem.reads[perm] = torch.eye(spec.perm_shapes[perm][0], device="cpu").double()
        order.append(perm)
    return order


def _groups(problem: WidthProblem, perm: str, count: int, *, homogeneous: bool) -> tuple[Tensor, Tensor]:
    """The matrices ``(count, units)`` of :class:`WidthMatching`: by what units are written, and are read."""
    written = torch.cat([one for one, _ in problem.rows(perm, reads=False)], 1)
    nothing = torch.zeros(len(written), dtype=torch.float64, device="cpu")
    read = sum((one.square().sum(1) for one, _ in problem.rows(perm, reads=True)), nothing)
    length = written.norm(dim=1) if homogeneous else torch.ones_like(nothing)
    inverse = torch.where(length > 0, 1 / length, 0.0)
    mass = read * length.square()
    group = _ward(written * inverse.unsqueeze(1), mass, count)
    member = torch.zeros(count, len(written), dtype=torch.float64, device="cpu")
    member[group, torch.arange(len(written), device="cpu")] = 1.0
    total = member @ mass
    shares = torch.where((total > 0).unsqueeze(1), member * mass, member)
    return shares / shares.sum(1, keepdim=True) * inverse, member * length


def _ward(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """Which of ``count`` groups each point is in, by merging the cheapest two again and again."""
    points, mass, group = points.clone(), mass.clone(), torch.arange(len(points), device="cpu")
    cost = torch.full((len(points), len(points)), torch.inf, dtype=points.dtype, device="cpu")
    alive = torch.ones(len(points), dtype=torch.bool, device="cpu")

    def costs(one: int) -> Tensor:
        both = mass + mass[one]
        found = mass * mass[one] / both.where(both > 0, 1.0) * (points - points[one]).square().sum(1)
        return torch.where(alive, found, torch.inf).index_fill_(0, torch.tensor([one], device="cpu"), torch.inf)

    for one in range(len(points)):
        cost[one] = costs(one)
    for _ in range(len(points) - count):
        one, other = divmod(int(cost.argmin()), len(points))
        total = mass[one] + mass[other]
        share = mass[other] / total if total > 0 else 0.5
        points[one] = points[one] + share * (points[other] - points[one])
        mass[one], alive[other] = total, False
        group[group == other] = one
        cost[other], cost[:, other] = torch.inf, torch.inf
        cost[one] = cost[:, one] = costs(one)
    left = group.tolist()
    places = {one: place for place, one in enumerate(sorted(set(left)))}
    return torch.tensor([places[one] for one in left], device="cpu")
