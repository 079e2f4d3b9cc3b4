"""Apply, invert and compose permutations of state dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.layout import Layout, positions
from fedrebasin.spec import PermutationSpec

Perms = dict[str, Tensor]


def permute(spec: PermutationSpec, perms: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the hidden units of a network into another order.

    Parameters
    ----------
    spec : PermutationSpec
    perms : dict of str to Tensor
        For each permutation of the spec an int64 index vector of shape ``(n,)``, ``new[i] = old[perm[i]]``; for a
        family one of shape ``(outer, n)``, whose row ``g`` holds within the new outer index ``g``.
    state : dict of str to Tensor
        A state dict; it is not changed.

    Returns
    -------
    dict of str to Tensor
        New tensors under the same keys, in the same order, with the same dtypes and devices.

    Raises
    ------
    SpecMismatchError
        If ``perms`` are not permutations of this spec, or ``state`` has other tensors or shapes.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> spec = trace(net, (torch.randn(2, 1),))
    >>> moved = permute(spec, {"0": torch.tensor([2, 0, 1])}, net.state_dict())
    >>> bool((moved["0.bias"] == net[0].bias[[2, 0, 1]]).all())
    True
    """
    check_perms(spec, perms)
    spec.check_state(state)
    order = application_order(spec)
    return like_state(
        state, {name: permute_tensor(spec.axes[name], order, perms, tensor) for name, tensor in state.items()}
    )


def application_order(spec: PermutationSpec) -> list[tuple[str, str]]:
    """Each permutation with the leaf it is over; families last, because their rows follow the new outer order."""
    plain = [(perm, "") for perm in spec.perm_shapes if perm not in spec.over]
    return plain + [(perm, outer) for perm, outer in spec.over.items()]


def permute_tensor(
    layouts: tuple[Layout, ...], order: list[tuple[str, str]], perms: Mapping[str, Tensor], tensor: Tensor
) -> Tensor:
    """Permute one tensor; the result never shares memory with it."""
    result = tensor
    for perm, outer in order:
        if perm in perms:
            for dim, layout in enumerate(layouts):
                result = _permute_axis(layouts, dim, positions(layout, perm), perms[perm], outer, result)
    return result.clone() if result is tensor else result


def _permute_axis(
    layouts: tuple[Layout, ...], dim: int, places: Tensor | None, perm: Tensor, outer: str, tensor: Tensor
) -> Tensor:
    if places is None:
        return tensor
    perm = perm.cpu()
    index = torch.arange(tensor.shape[dim])
    if not outer:
        index[places] = places[perm]
        return tensor.index_select(dim, index.to(tensor.device))
    own = positions(layouts[dim], outer)
    if own is not None:
        grid = family_grid(own, places, tensor.shape[dim])
        index[grid] = grid.gather(1, perm.unsqueeze(2).expand_as(grid))
        return tensor.index_select(dim, index.to(tensor.device))
    other = outer_dim(layouts, dim, outer)
    rows = coordinate(layouts[other], outer)
    table = torch.stack([index.clone().index_put((places,), places[row]) for row in perm])[rows].to(tensor.device)
    front = tensor.movedim((other, dim), (0, 1))
    moved = front[torch.arange(len(rows), device=tensor.device).unsqueeze(1), table]
    return moved.movedim((0, 1), (other, dim)).contiguous()


def outer_dim(layouts: tuple[Layout, ...], dim: int, outer: str) -> int:
    """The other axis that has the leaf ``outer``."""
    return next(other for other, layout in enumerate(layouts) if other != dim and positions(layout, outer) is not None)


def coordinate(layout: Layout, name: str) -> Tensor:
    """For every index along an axis, the index of the leaf ``name``: int64 of shape ``(size,)``, -1 elsewhere.

    >>> from fedrebasin.layout import Fixed, Free, Product
    >>> coordinate(Product((Free("c", 2), Fixed(3))), "c")
    tensor([0, 0, 0, 1, 1, 1])
    """
    places = positions(layout, name)
    result = torch.full((layout.size,), -1)
    if places is not None:
        result[places] = torch.arange(len(places)).unsqueeze(1).expand_as(places)
    return result


def family_grid(outer: Tensor, inner: Tensor, size: int) -> Tensor:
    """Where unit ``i`` within outer index ``g`` lies along their common axis: int64 ``(outer, n, copies)``."""
    key = torch.full((size,), -1)
    key[outer] = torch.arange(len(outer)).unsqueeze(1).expand_as(outer) * len(inner)
    own = torch.full((size,), -1)
    own[inner] = torch.arange(len(inner)).unsqueeze(1).expand_as(inner)
    both = (own >= 0) & (key >= 0)
    where = both.nonzero().squeeze(1)
    return where[torch.argsort((key + own)[both], stable=True)].view(len(outer), len(inner), -1)


def identity_perms(spec: PermutationSpec) -> Perms:
    """The permutations that move nothing."""
    return {perm: torch.arange(shape[-1]).expand(shape).clone() for perm, shape in spec.perm_shapes.items()}


def random_perms(spec: PermutationSpec, seed: int | torch.Generator = 0) -> Perms:
    """Uniformly random permutations, one for each entry of the spec and each row of a family."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        rows = shape[0] if len(shape) == 2 else 1
        return torch.stack([torch.randperm(shape[-1], generator=generator) for _ in range(rows)]).view(shape)

    return {perm: draw(shape) for perm, shape in spec.perm_shapes.items()}


def invert(spec: PermutationSpec, perms: Mapping[str, Tensor]) -> Perms:
    """The permutations that undo ``perms``.

    >>> from fedrebasin import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1)), (torch.randn(2, 1),))
    >>> invert(spec, {"0": torch.tensor([2, 0, 1])})
    {'0': tensor([1, 2, 0])}
    """
    check_perms(spec, perms)
    result = {perm: perms[perm].argsort() for perm in spec.perm_shapes if perm not in spec.over}
    for perm, outer in spec.over.items():
        rows = perms[perm] if outer not in result else perms[perm][result[outer]]
        result[perm] = rows.argsort(dim=1)
    return {perm: result[perm] for perm in spec.perm_shapes}


def compose(spec: PermutationSpec, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Perms:
    """The permutations that act like ``first`` and then ``second``.

    >>> from fedrebasin import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1)), (torch.randn(2, 1),))
    >>> compose(spec, {"0": torch.tensor([2, 0, 1])}, {"0": torch.tensor([1, 0, 2])})
    {'0': tensor([0, 2, 1])}
    """
    check_perms(spec, first)
    check_perms(spec, second)
    result = {}
    for perm in spec.perm_shapes:
        if perm not in spec.over:
            result[perm] = first[perm][second[perm]]
        else:
            outer = second.get(spec.over[perm])
            rows = first[perm] if outer is None else first[perm][outer]
            result[perm] = rows.gather(1, second[perm])
    return result


def moved_fraction(perms: Mapping[str, Tensor]) -> float:
    """Share of units that change place, in [0, 1].

    >>> moved_fraction({"a": torch.tensor([1, 0, 2, 3])})
    0.5
    """
    moved = sum(int((perm != torch.arange(perm.shape[-1])).sum()) for perm in perms.values())
    return moved / max(1, sum(perm.numel() for perm in perms.values()))


def check_perms(spec: PermutationSpec, perms: Mapping[str, Tensor]) -> None:
    """Raise :class:`SpecMismatchError` unless ``perms`` are permutations of this spec."""
    if set(perms) != set(spec.perm_shapes):
        odd = sorted(set(perms) ^ set(spec.perm_shapes))
        raise SpecMismatchError(
            f"perms: expected exactly the spec's {len(spec.perm_shapes)} perms; {odd[0]!r} is in one only"
        )
    for name, shape in spec.perm_shapes.items():
        perm = perms[name]
        if not isinstance(perm, Tensor) or perm.dtype != torch.int64 or tuple(perm.shape) != shape:
            got = f"{perm.dtype} of shape {tuple(perm.shape)}" if isinstance(perm, Tensor) else type(perm).__name__
            raise SpecMismatchError(f"perms: expected {name!r} as int64 of shape {shape}; got {got}")
        if not bool((perm.sort(dim=-1).values.cpu() == torch.arange(shape[-1])).all()):
            raise SpecMismatchError(
                f"perms: {name!r} is not a permutation: each of 0..{shape[-1] - 1} must be there once"
            )


def like_state(state: Mapping[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values`` in the order of ``state``, with its ``_metadata`` where it carries one (some loaders need it)."""
    result: dict[str, Tensor] = OrderedDict((name, values[name]) for name in state)
    metadata: Any = getattr(state, "_metadata", None)
    if metadata is None:
        return dict(result)
    result._metadata = metadata  # type: ignore[attr-defined]
    return result
