"""Apply permutations to state dicts."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
    outer_dims = [outer_dims_of(layouts, dim) for dim in range(len(layouts))]
    result = tensor
    for dim in sorted(range(len(layouts)), key=lambda dim: len(outer_dims[dim])):  # outer axes before what is over them
        if any(isinstance(leaf, Free) and leaf.perm in perms for leaf in leaves(layouts[dim])):
            result = _permute_axis(layouts, dim, outer_dims[dim], perms, {}, result)
    return result.clone() if result is tensor else result


def outer_dims_of(layouts: Sequence[Layout], dim: int) -> list[tuple[str, int]]:
    """The leaves on other axes on which the order along ``dim`` depends, the fixed ones first."""
    names = sorted(name for name in outer_names(layouts[dim]) if not has_leaf(layouts[dim], name))
    found = [(name, other) for name in names for other, layout in enumerate(layouts) if has_leaf(layout, name)]
    perms = {leaf.perm for layout in layouts for leaf in leaves(layout) if isinstance(leaf, Free)}
    return sorted(dict(found).items(), key=lambda item: item[0] in perms)


def _permute_axis(
    layouts: Sequence[Layout],
    dim: int,
    outer_dims: list[tuple[str, int]],
    perms: Mapping[str, Tensor],
    at: dict[str, int],
    tensor: Tensor,
) -> Tensor:
    if not outer_dims:
        return tensor.index_select(dim, source(layouts[dim], perms, at).to(tensor.device))
    (outer, other), *rest = outer_dims
    rows = units(layouts[other], outer, at=at).to(tensor.device)
    result = tensor.clone()
    for index in range(int(rows.max()) + 1):
        where = (rows == index).nonzero().squeeze(1)
        part = tensor.index_select(other, where)
        result.index_copy_(other, where, _permute_axis(layouts, dim, rest, perms, {**at, outer: index}, part))
    return result


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
                return torch.arange(layout.size)
            return (perm[at[layout.over]] if layout.over else perm).cpu()
        case Fixed():
            return torch.arange(layout.size)
        case Each():
            return source(layout.parts[at[layout.over]], perms, at)
        case Sum():
            starts = [0, *itertools.accumulate(part.size for part in layout.parts[:-1])]
            parts = zip(starts, layout.parts, strict=True)
            return torch.cat([start + source(part, perms, at) for start, part in parts])
        case Product():
            outer = own_outer(layout, set(at))
            if outer is not None:
                return per_index(layout, outer, at, lambda inside: source(layout, perms, inside))
            index = torch.zeros(1, dtype=torch.int64)
            for factor in layout.factors:
                index = (index.unsqueeze(1) * factor.size + source(factor, perms, at)).flatten()
            return index


def like_state(state: Mapping[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values`` in the order of ``state``, with its ``_metadata`` where it carries one (some loaders need it)."""
    result: dict[str, Tensor] = OrderedDict((name, values[name]) for name in state)
    metadata: Any = getattr(state, "_metadata", None)
    if metadata is None:
        return dict(result)
    result._metadata = metadata  # type: ignore[attr-defined]
    return result
