"""A network whose width was changed, and which networks' widths can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedrebasin.errors import RebasinError
from fedrebasin.layout import Fixed, Free
from fedrebasin.layout_edit import map_leaves
from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.maps import WidthMatching, is_known

#: Layers that look at all units at once: their output changes with every unit that is added, a dead one too.
_WHOLE = ("layer_norm", "group_norm", "rms_norm")


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


def check_can_resize(spec: PermutationSpec) -> None:
    """Raise :class:`RebasinError` where units cannot be added or merged without a change of function."""
    if spec.over:
        raise RebasinError(
            f"specs: expected no units inside heads or groups, whose number cannot change; got "
            f"{next(iter(spec.over))!r}; keep the widths, with match_many or merge_widths"
        )
    for name in dict.fromkeys(axis.name for axes in spec.tied.values() for axis in axes):
        use = spec.uses.get(name, "no op")
        if use.startswith(_WHOLE):
            raise RebasinError(
                f"specs: {name!r} is used by {use}, which looks at all units at once, so that their number cannot "
                "change; keep the widths, with match_many"
            )
        if name in spec.parameters and not is_known(spec, name):
            raise RebasinError(
                f"specs: expected ops whose weights are known to be read along one axis; {name!r} is used by {use}; "
                "keep the widths, with match_many or merge_widths"
            )


def with_units(spec: PermutationSpec, sizes: Mapping[str, int]) -> PermutationSpec:
    """The spec with other numbers of units.

    >>> with_units(PermutationSpec({"w": (Free("a", 3), Fixed(2))}), {"a": 5}).shapes
    {'w': (5, 2)}
    """

    def change(leaf: Free | Fixed) -> Free | Fixed:
        return replace(leaf, size=sizes[leaf.perm]) if isinstance(leaf, Free) and leaf.perm in sizes else leaf

    axes = {name: tuple(map_leaves(layout, change) for layout in layouts) for name, layouts in spec.axes.items()}
    return replace(spec, axes=axes)
