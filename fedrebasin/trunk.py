"""Partial merging: which tensors networks with different heads share up to a layer, and how their trunks match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedrebasin.counterparts import common_perms
from fedrebasin.errors import RebasinError, SpecMismatchError
from fedrebasin.matching import ManyMatching, match_many
from fedrebasin.memory import identity
from fedrebasin.perms import identity_perms
from fedrebasin.spec import PermutationSpec

State = Mapping[str, Tensor]


def trunk_tensors(spec: PermutationSpec, until: str) -> tuple[str, ...]:
    """The tensors that a network uses up to the module or tensor ``until``, that one with them.

    The order is that of the traced graph, not of the state dict: what runs beside the trunk and before the last
    tensor of ``until`` belongs to it. A tensor that the graph does not use (a counter) goes with its module.

    Parameters
    ----------
    spec : PermutationSpec
        Traced: one typed by hand has no order.
    until : str
        A module's name, such as ``"layer3"``, or a tensor's.

    Returns
    -------
    tuple of str
        In the order of the state dict.

    Raises
    ------
    RebasinError
        If no tensor that the graph uses is ``until`` or in it.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrebasin import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> trunk_tensors(trace(net, (torch.randn(2, 4),)), "0")
    ('0.weight', '0.bias')
    """
    order = {name: place for place, name in enumerate(spec.uses)}
    inside = [place for name, place in order.items() if name == until or name.startswith(f"{until}.")]
    if not inside:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in order))
        raise RebasinError(f"until: expected a module that holds used tensors, one of {modules}; got {until!r}")
    last = max(inside)
    by_module: dict[str, list[bool]] = {}
    for name, place in order.items():
        by_module.setdefault(name.rpartition(".")[0], []).append(place <= last)
    return tuple(
        name
        for name in spec.axes
        if (order[name] <= last if name in order else all(by_module.get(name.rpartition(".")[0], [False])))
    )


def match_trunks(
    specs: Sequence[PermutationSpec],
    models: Sequence[State],
    *,
    until: str,
    coefficients: Sequence[float] | None = None,
    method: str = "merge-many",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ManyMatching:
    """Find one permutation dict for each model so that their trunks share one order of units.

    The heads have no say. The units that a head reads are free all the same: :func:`fedrebasin.permute` with a model's
    own spec moves the head's inputs with them, so that its function stays. What some head fixes or ties stays.

    Parameters
    ----------
    specs : sequence of PermutationSpec
        One for each model, each of its whole network.
    models : sequence of dict of str to Tensor
        Whole state dicts; none is changed.
    until : str
        The trunk's last module; see :func:`trunk_tensors`.
    coefficients, method, seed, device : optional
        As for :func:`fedrebasin.match_many`.

    Returns
    -------
    ManyMatching
        Its perms are those of each model's own spec, the identity where only the head has units.

    Raises
    ------
    RebasinError
        If a spec lacks ``until``, there is not one spec for each model, or a tensor of the trunk is tied to the head.
    SpecMismatchError
        If the trunks have other tensors or shapes, or a state dict does not fit its spec.

    References
    ----------
    Stoica et al. (ICLR 2024), "ZipIt! Merging models from different tasks without training": merging up to a layer.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrebasin import trace
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (2, 5)]
    >>> specs = [trace(net, (torch.randn(2, 4),)) for net in nets]
    >>> found = match_trunks(specs, [net.state_dict() for net in nets], until="0")
    >>> [perms["0"].shape for perms in found.perms]
    [torch.Size([8]), torch.Size([8])]
    """
    names = check_trunks(specs, models, until)
    first = specs[0]
    common = [common_perms(first, spec, names) for spec in specs]
    kept = {perm for perm in first.perm_shapes if all(perm in pairs for pairs in common)}
    trunk = first.fix(*(perm for perm in first.perm_shapes if perm not in kept), reason="not free in every model")
    trunk = trunk.only(names, fix=False)
    parts = [{name: model[name] for name in names} for model in models]
    found = match_many(trunk, parts, coefficients=coefficients, method=method, seed=seed, device=device)
    perms = [
        {**identity_perms(spec), **{pairs[perm]: order for perm, order in mine.items()}}
        for spec, pairs, mine in zip(specs, common, found.perms, strict=True)
    ]
    return replace(found, perms=perms)


def check_trunks(specs: Sequence[PermutationSpec], models: Sequence[State], until: str) -> tuple[str, ...]:
    """The tensors of the trunk, the same in every model; raises as :func:`match_trunks`."""
    if not models or len(specs) != len(models):
        raise RebasinError(f"specs: expected one for each model; got {len(specs)} for {len(models)} models")
    names = trunk_tensors(specs[0], until)
    for place, (spec, model) in enumerate(zip(specs, models, strict=True)):
        spec.check_state(model, f"models[{place}]")
        odd = sorted(set(names) ^ set(trunk_tensors(spec, until)))
        if odd:
            raise SpecMismatchError(
                f"models[{place}]: expected the tensors of models[0] up to {until!r}; {odd[0]!r} is in one only; "
                "share less, with an earlier until"
            )
        inside = {identity(model[name]): name for name in names}
        tied = next((name for name in model if name not in names and identity(model[name]) in inside), None)
        if tied is not None:
            raise RebasinError(
                f"until: {tied!r} of models[{place}] lies beyond {until!r} and is one tensor with "
                f"{inside[identity(model[tied])]!r} of the trunk; untie them first"
            )
    return names
