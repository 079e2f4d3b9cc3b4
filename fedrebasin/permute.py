"""Apply permutations to state dicts."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fedrebasin.layout import (
    Each,
    Fixed,
    Free,
    Layout,
    Product,
    Sum,
    has_leaf,
    leaves,
    outer_names,
    own_outer,
    per_index,
    units,
    unknown_outers,
)
from fedrebasin.perms import check_perms
from fedrebasin.spec import PermutationSpec


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
    return like_state(state, {name: permute_tensor(spec.axes[name], perms, tensor) for name, tensor in state.items()})


def permute_tensor(layouts: Sequence[Layout], perms: Mapping[str, Tensor], tensor: Tensor) -> Tensor:
    """Permute one tensor; the result never shares memory with it, and perms that are not there move nothing."""
    result = tensor
    for dim in sorted(range(len(layouts)), key=lambda dim: len(outer_names(layouts[dim]))):  # outer axes come first
        if any(isinstance(leaf, Free) and leaf.perm in perms for leaf in leaves(layouts[dim])):
            result = _permute_axis(layouts, dim, perms, result)
    return result.clone() if result is tensor else result


def _permute_axis(layouts: Sequence[Layout], dim: int, perms: Mapping[str, Tensor], tensor: Tensor) -> Tensor:
    result = tensor
    for at, places in regions(layouts, dim):
        part = tensor
        for other, where in places.items():
            part = part.index_select(other, where.to(tensor.device))
        part = part.index_select(dim, source(layouts[dim], perms, at).to(tensor.device))
        if not places:
            return part
        result = result.clone() if result is tensor else result
        _write(result, list(places.items()), part)
    return result


def _write(tensor: Tensor, places: Sequence[tuple[int, Tensor]], part: Tensor) -> None:
    """Overwrite the entries at these indices along these axes."""
    (dim, where), *others = places
    where = where.to(tensor.device)
    if others:
        rest = tensor.index_select(dim, where)
        _write(rest, others, part)
        part = rest
    tensor.index_copy_(dim, where, part)


def regions(
    layouts: Sequence[Layout],
    dim: int,
    at: Mapping[str, int] = MappingProxyType({}),
    places: Mapping[int, Tensor] = MappingProxyType({}),
) -> Iterator[tuple[Mapping[str, int], Mapping[int, Tensor]]]:
    """The parts of a tensor in each of which ``dim`` has one order: indices of outer leaves, and other axes' indices.

    >>> from fedrebasin.layout import Fixed
    >>> list(regions([Fixed(2, "", "halves"), Free("a", 4, over="halves")], 1))
    [({'halves': 0}, {0: tensor([0])}), ({'halves': 1}, {0: tensor([1])})]
    """
    found = _next_outer(layouts, dim, at)
    if found is None:
        yield at, places
        return
    outer, other = found
    where = places.get(other, torch.arange(layouts[other].size, device="cpu"))
    rows = units(layouts[other], outer, at=at)[where]
    for index in range(int(rows.max()) + 1):
        yield from regions(layouts, dim, {**at, outer: index}, {**places, other: where[rows == index]})


def outer_dims_of(layouts: Sequence[Layout], dim: int) -> list[tuple[str, int]]:
    """The leaves on other axes on which the order along ``dim`` depends, the fixed ones first."""
    names = sorted(name for name in outer_names(layouts[dim]) if not has_leaf(layouts[dim], name))
    found = [(name, other) for name in names for other, layout in enumerate(layouts) if has_leaf(layout, name)]
    perms = {leaf.perm for layout in layouts for leaf in leaves(layout) if isinstance(leaf, Free)}
    return sorted(dict(found).items(), key=lambda item: item[0] in perms)


def _next_outer(layouts: Sequence[Layout], dim: int, at: Mapping[str, int]) -> tuple[str, int] | None:
    """A leaf on whose index the order along ``dim`` depends, and its axis, whose own order depends on nothing else."""
    outer = next(unknown_outers(layouts[dim], at), None)
    if outer is None:
        return None
    other = next(d for d, layout in enumerate(layouts) if d != dim and has_leaf(layout, outer))
    return _next_outer(layouts, other, at) or (outer, other)


def source(layout: Layout, perms: Mapping[str, Tensor], at: Mapping[str, int]) -> Tensor:
    """For every new index along an axis the old one; ``at`` gives new indices of outer leaves on other axes.

    >>> from fedrebasin.layout import Fixed, Product
    >>> source(Product((Free("c", 2), Fixed(3))), {"c": torch.tensor([1, 0])}, {})
    tensor([3, 4, 5, 0, 1, 2])
    """
    match layout:
        case Free():
            perm = perms.get(layout.perm)
            if perm is None:
                return torch.arange(layout.size, device="cpu")
            return (perm[at[layout.over]] if layout.over else perm).cpu()
        case Fixed():
            return torch.arange(layout.size, device="cpu")
        case Each():
            return source(layout.parts[at[layout.over]], perms, at)
        case Sum():
            starts = [0, *itertools.accumulate(part.size for part in layout.parts[:-1])]
            parts = zip(starts, layout.parts, strict=True)
            return torch.cat([start + source(part, perms, at) for start, part in parts])
        case Product():
            outer = own_outer(layout, at)
            if outer is not None:
                return per_index(layout, outer, at, lambda inside: source(layout, perms, inside))
            index = torch.zeros(1, dtype=torch.int64, device="cpu")
            for factor in layout.factors:
                index = (index.unsqueeze(1) * factor.size + source(factor, perms, at)).flatten()
            return index


def like_state(state: Mapping[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values`` in the order of ``state``, with its ``_metadata`` where it carries one (some loaders need it)."""
    result: dict[str, Tensor] = OrderedDict((name, values[name]) for name in state)
    metadata: Any = getattr(state, "_metadata", None)
    if metadata is None:
        return dict(result)
    result._metadata = metadata  # type: ignore[attr-defined]  # as nn.Module.state_dict sets it
    return result
