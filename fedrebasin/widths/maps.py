"""What a matching of two widths is: for every permutation two matrices, by which units are written and are read.

A layer *writes* units (rows of a linear layer's weight, biases, norms) and the next one *reads* them (columns). Row i
of the matrix for writing says of which of the model's units the reference's unit i is the mean; column j of the one
for reading says among which of the reference's units what is read from the model's unit j is divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedrebasin.counterparts import common_perms
from fedrebasin.errors import SpecMismatchError
from fedrebasin.layout import Each, Free, Layout, Product, Sum, axis_mask, leaves
from fedrebasin.permute import like_state
from fedrebasin.resizable import read_axis
from fedrebasin.spec import PermutationSpec

Maps = Mapping[str, Tensor]


@dataclass(frozen=True)
class WidthMatching:
    """Which units of a model are which of a reference that is wider, narrower, or wider here and narrower there.

    Attributes
    ----------
    reference_spec, model_spec : PermutationSpec
    writes, reads : dict of str to Tensor, shape (units of the reference, units of the model), float64
        By the reference's names of the permutations; see :mod:`fedrebasin.widths.maps`.
    objective : float
        The sum over tied parameters of <reference, model made to fit>, one unit to one.
    """

    reference_spec: PermutationSpec
    model_spec: PermutationSpec
    writes: dict[str, Tensor] = field(repr=False)
    reads: dict[str, Tensor] = field(repr=False)
    objective: float = 0.0

    def inverse(self) -> WidthMatching:
        """The matching the other way: it gives a model of the reference's width the model's own."""
        names = common_units(self.reference_spec, self.model_spec)
        return WidthMatching(
            self.model_spec,
            self.reference_spec,
            {names[perm]: matrix.T for perm, matrix in self.reads.items()},
            {names[perm]: matrix.T for perm, matrix in self.writes.items()},
            self.objective,
        )

    @cached_property
    def present(self) -> dict[str, Tensor]:
        """For every permutation, which units of the reference the model has: bool ``(units,)``."""
        return {perm: (self.writes[perm] != 0).any(1) | (self.reads[perm] != 0).any(1) for perm in self.writes}


def resize(matching: WidthMatching, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a model the reference's order of units and its width.

    A unit that the model lacks is dead: what writes it and what reads it is zero, its running variance one.

    Parameters
    ----------
    matching : WidthMatching
    model : dict of str to Tensor
        A state dict of ``matching.model_spec``; it is not changed.

    Returns
    -------
    dict of str to Tensor
        Of ``matching.reference_spec``, with the model's order of keys, dtypes and devices.

    Raises
    ------
    SpecMismatchError
        If ``model`` does not fit.

    Examples
    --------
    >>> from fedrebasin import match_widths, trace
    >>> wide, narrow = (torch.nn.Sequential(torch.nn.Linear(2, n), torch.nn.Linear(n, 1)) for n in (5, 3))
    >>> specs = [trace(net, (torch.randn(2, 2),)) for net in (wide, narrow)]
    >>> resize(match_widths(*specs, wide.state_dict(), narrow.state_dict()), narrow.state_dict())["0.weight"].shape
    torch.Size([5, 2])
    """
    matching.model_spec.check_state(model)
    result = {}
    for name, tensor in model.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        new, pairs = tensor.double(), layouts_of(matching.reference_spec, matching.model_spec, name)
        for dim, (one, other) in enumerate(pairs):
            maps = matching.reads if dim == read_axis(matching.model_spec, name) else matching.writes
            new = map_axis(new, dim, one, other, maps)
        if name.endswith("running_var") and new.ndim == 1:
            new = torch.where(axis_mask(pairs[0][0], matching.present).to(new.device), new, 1.0)
        result[name] = new.to(tensor.dtype)
    return like_state(model, result)


def layouts_of(first: PermutationSpec, second: PermutationSpec, name: str) -> list[tuple[Layout, Layout]]:
    """The layouts of a tensor's axes in both specs."""
    return list(zip(first.axes[name], second.axes[name], strict=True))


def common_units(first: PermutationSpec, second: PermutationSpec) -> dict[str, str]:
    """The permutations whose units can be matched, by their names in both specs.

    Raises
    ------
    SpecMismatchError
        If the networks are not of one kind, or differ in the width of what cannot be matched.
    """
    odd = sorted(set(first.axes) ^ set(second.axes))
    if odd:
        raise SpecMismatchError(f"specs: expected networks of one kind; {odd[0]!r} is in one only")
    pairs = common_perms(first, second, first.axes, sizes=False)
    common = {one: other for one, other in pairs.items() if one not in first.over}
    for name in first.axes:
        for dim, (one, other) in enumerate(layouts_of(first, second, name)):
            if not _fits(one, other, common):
                raise SpecMismatchError(
                    f"specs: axis {dim} of {name!r} has {one.size} units in one and {other.size} in the other, and "
                    "they are no permutation's of their own in both (heads' and groups' inner units, fixed units); let "
                    "these have one width"
                )
    return common


def map_axis(tensor: Tensor, dim: int, one: Layout, other: Layout, maps: Maps) -> Tensor:
    """Bring one axis from the layout ``other`` to ``one``, by a matrix for each permutation of ``one``."""
    match one, other:
        case Free(perm=perm), Free() if perm in maps:
            matrix = maps[perm].to(tensor)
            filled = matrix != 0
            if int(filled.sum(1).max()) <= 1:  # one unit to one: a copy, not a product
                values, sources = torch.where(filled, matrix, 0).sum(1), filled.int().argmax(1)
                return tensor.index_select(dim, sources) * values.view([-1] + [1] * (tensor.ndim - dim - 1))
            mapped: Tensor = torch.tensordot(matrix, tensor, ([1], [dim]))
            return mapped.movedim(0, dim)
        case Sum(parts=ones), Sum(parts=others) if len(ones) == len(others):
            pieces = tensor.split_with_sizes([part.size for part in others], dim)
            parts = zip(pieces, ones, others, strict=True)
            return torch.cat([map_axis(piece, dim, a, b, maps) for piece, a, b in parts], dim)
        case Product(factors=ones), Product(factors=others) if len(ones) == len(others):
            tensor = unflatten(tensor, dim, [factor.size for factor in others])
            for place, (a, b) in enumerate(zip(ones, others, strict=True)):
                tensor = map_axis(tensor, dim + place, a, b, maps)
            return tensor.flatten(dim, dim + len(ones) - 1)
        case _:
            return tensor


def unflatten(tensor: Tensor, dim: int, sizes: list[int]) -> Tensor:
    """One axis as several, the outermost first."""
    return tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


def _fits(one: Layout, other: Layout, common: Mapping[str, str]) -> bool:
    match one, other:
        case Free(perm=perm), Free() if perm in common:
            return True
        case (Sum(parts=ones), Sum(parts=others)) | (Product(factors=ones), Product(factors=others)) if len(
            ones
        ) == len(others):
            return all(_fits(a, b, common) for a, b in zip(ones, others, strict=True))
        case Each(), _:
            perms = {leaf.perm for leaf in leaves(one) if isinstance(leaf, Free)}
            return one.size == other.size and not perms & set(common)
        case _:
            return one.size == other.size
