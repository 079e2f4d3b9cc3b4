"""Copies that follow a part of the network outside of the forward pass: momentum encoders, averages of weights.

``copy = 0.99 * copy + 0.01 * original`` after each step is in no graph, so a trace gives both parts permutations of
their own, and the next such step would mix units that are not the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from fedrebasin.errors import RebasinError
from fedrebasin.layout import Each, Free, Layout, Product, Sum, leaves
from fedrebasin.layout_edit import fix_leaf, map_leaves, rename_leaf
from fedrebasin.ties import Axes, all_leaves


def tie_copies(axes: Axes, copies: Mapping[str, str], used: Collection[str]) -> dict[str, tuple[Layout, ...]]:
    """The axes with every copy's permutations made one with its original's; see :meth:`PermutationSpec.tie`.

    Of a tensor that is not ``used`` in the graph nothing is known, and it gets the axes of its original. Where only one
    of the two is free, or they are composed of different parts, both are fixed.

    >>> axes = {"a.w": (Free("a", 3),), "b.w": (Free("b", 3),)}
    >>> tie_copies(axes, {"b": "a"}, axes)["b.w"]
    (Free(perm='a', size=3, over=''),)
    """
    pairs = _pairs(axes, copies)
    same: dict[str, str] = {}

    def root(perm: str) -> str:
        return root(same[perm]) if perm in same else perm

    stay: set[str] = set()
    for name in (name for name in pairs if name in used):
        for mine, theirs in zip(axes[name], axes[pairs[name]], strict=True):
            alike = _tree(mine) == _tree(theirs)
            ends = list(zip(leaves(mine), leaves(theirs), strict=True)) if alike else []
            for one, two in ends:
                if isinstance(one, Free) and isinstance(two, Free) and root(one.perm) != root(two.perm):
                    same[root(one.perm)] = root(two.perm)
            if not alike or any(isinstance(one, Free) != isinstance(two, Free) for one, two in ends):
                stay.update(end.perm for end in (*leaves(mine), *leaves(theirs)) if isinstance(end, Free))
    overs: dict[str, set[str]] = {}
    for end in all_leaves(axes):
        if isinstance(end, Free):
            overs.setdefault(root(end.perm), set()).add(root(end.over))
    reasons = {root(perm): "a copy's that stays" for perm in stay}
    reasons.update({perm: "a copy's over other units" for perm, outer in overs.items() if len(outer) > 1})
    names = {perm: root(perm) for perm in same}
    found = {
        name: tuple(map_leaves(layout, lambda end: fix_leaf(rename_leaf(end, names), reasons)) for layout in layouts)
        for name, layouts in axes.items()
    }
    return {**found, **{name: found[other] for name, other in pairs.items() if name not in used}}


def _pairs(axes: Axes, copies: Mapping[str, str]) -> dict[str, str]:
    """The original of every copy's tensor."""
    found: dict[str, str] = {}
    for follower, original in copies.items():
        names = [name for name in axes if name == follower or name.startswith(f"{follower}.")]
        if not names:
            raise RebasinError(f"copies: expected modules or tensors of this spec; got {follower!r}")
        for name in names:
            other = original + name.removeprefix(follower)
            if other not in axes:
                raise RebasinError(
                    f"copies: expected {original!r} to have what {follower!r} has; {other!r}, the original of "
                    f"{name!r}, is not there; name modules or tensors that are alike"
                )
            sizes = [tuple(layout.size for layout in axes[one]) for one in (name, other)]
            if sizes[0] != sizes[1]:
                raise RebasinError(
                    f"copies: expected {name!r} and {other!r} of one shape; got {sizes[0]} and {sizes[1]}"
                )
            found[name] = other
    return found


def _tree(layout: Layout) -> object:
    """What a layout is composed of, whatever moves it."""
    match layout:
        case Sum(parts=children) | Product(factors=children) | Each(parts=children):
            return type(layout), [_tree(child) for child in children]
        case _:
            return layout.size


def followers(model: nn.Module, unused: Collection[str] = ()) -> dict[str, str]:
    """Modules that look like copies which follow another one: equal to it in names and values, but not trained.

    ``unused`` names parameters that are in no graph, and so are not trained, either.

    >>> import copy
    >>> online = nn.Linear(2, 3)
    >>> target = copy.deepcopy(online).requires_grad_(False)
    >>> followers(nn.ModuleDict({"online": online, "target": target}))
    {'target': 'online'}
    """
    trained: dict[object, list[str]] = {}
    rest: list[tuple[str, object]] = []
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters())
        kind: object = tuple((key, tuple(tensor.shape)) for key, tensor in parameters.items())
        reached = {tensor.requires_grad and f"{name}.{key}" not in unused for key, tensor in parameters.items()}
        if name and reached == {True}:
            trained.setdefault(kind, []).append(name)
        elif name and reached == {False} and any(tensor.ndim > 1 for tensor in parameters.values()):
            rest.append((name, kind))
    found: dict[str, str] = {}
    for name, kind in rest:
        if not any(name.startswith(f"{outer}.") for outer in found):
            original = next((other for other in trained.get(kind, ()) if _equal(model, name, other)), None)
            if original:
                found[name] = original
    return found


def note_on(follower: str) -> str:
    """How a spec's note on a module that looks like a copy begins."""
    return f"{follower!r} looks like a copy of "


def _equal(model: nn.Module, first: str, second: str) -> bool:
    pairs = zip(model.get_submodule(first).parameters(), model.get_submodule(second).parameters(), strict=True)
    return all(
        (one.dtype, one.device) == (other.dtype, other.device) and not one.is_meta and torch.equal(one, other)
        for one, other in pairs
    )
