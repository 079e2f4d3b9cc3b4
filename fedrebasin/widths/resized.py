"""A network whose width was changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedrebasin.layout import Fixed, Free
from fedrebasin.layout_edit import map_leaves
from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.maps import WidthMatching


@dataclass(frozen=True)
class Resized:
    """A network of another width than those that it was made from, and where their units are in it.

    Attributes
    ----------
    spec : PermutationSpec
        The models' spec with more units or fewer; not checked, since no module was at hand.
    state : dict of str to Tensor
        Fits the spec. A module of the models' architecture runs with it in ``torch.func.functional_call``, as long as
        its forward pass has no width written into it.
    matchings : list of WidthMatching
        One for each model, with the resized network as the reference: ``resize(matching, model)`` is the model in the
        new width, ``resize(matching.inverse(), state)`` the new network in the model's own width.
    """

    spec: PermutationSpec
    state: dict[str, Tensor] = field(repr=False)
    matchings: list[WidthMatching] = field(repr=False)

    @property
    def units(self) -> dict[str, int]:
        """For every permutation, how many units the network has."""
        return {perm: shape[0] for perm, shape in self.spec.perm_shapes.items()}


def with_units(spec: PermutationSpec, sizes: Mapping[str, int]) -> PermutationSpec:
    """The spec with other numbers of units.

    >>> with_units(PermutationSpec({"w": (Free("a", 3), Fixed(2))}), {"a": 5}).shapes
    {'w': (5, 2)}
    """

    def change(leaf: Free | Fixed) -> Free | Fixed:
        return replace(leaf, size=sizes[leaf.perm]) if isinstance(leaf, Free) and leaf.perm in sizes else leaf

    axes = {name: tuple(map_leaves(layout, change) for layout in layouts) for name, layouts in spec.axes.items()}
    return replace(spec, axes=axes)
