"""ZipIt: two networks' trunks merged with matches allowed within each, while their heads stay apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.coefficients import check_coefficients
from fedrebasin.counterparts import common_perms
from fedrebasin.errors import RebasinError
from fedrebasin.layout import Free, leaves
from fedrebasin.matching.numbers import refuse_complex
from fedrebasin.matching.similarity import Key, Similarity, measure_similarity
from fedrebasin.permute import like_state
from fedrebasin.resizable import check_can_resize, read_axis
from fedrebasin.spec import PermutationSpec
from fedrebasin.trunk import check_trunks
from fedrebasin.widths.maps import map_axis

State = Mapping[str, Tensor]
Maps = dict[str, Tensor]


def zip_trunks(
    specs: Sequence[PermutationSpec],
    net: nn.Module,
    models: Sequence[State],
    calibration: Iterable[Any],
    *,
    until: str,
    coefficients: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> list[dict[str, Tensor]]:
    """Merge two models' trunks of ``n`` units a layer by the best ``n`` groups among their ``2 n`` units.

    Units are grouped greedily by the correlation of their activations over data, also two of one model; of two
    groups the lowest correlation between their units counts. A group's unit is the mean of its units, by coefficients,
    and each model's next layer reads it once for each of its own: so redundant units of one model make room for the
    other's. It is ZipIt without its limit (alpha, beta) on merging within a model.

    Parameters
    ----------
    specs : sequence of two PermutationSpec
        Each of a whole network, checked; the heads may differ.
    net : nn.Module
        Of the first model's architecture; its own weights are not used.
    models : sequence of two dicts of str to Tensor
        Whole state dicts; neither is changed.
    calibration : iterable of batches
        Inputs, no labels; it is read three times.
    until : str
        The trunk's last module; see :func:`fedrebasin.trunk_tensors`.
    coefficients : sequence of float, optional
        Averaging weights, scaled to sum 1; equal by default.
    device : str, optional
        Where the models run; by default where the first one's tensors are.

    Returns
    -------
    list of dict of str to Tensor
        Two whole state dicts with one trunk, each with its own head. BatchNorm's statistics are averaged; reset them.

    Raises
    ------
    RebasinError
        If there are not two models and specs, or weights are complex; as :func:`match_trunks`; where widths cannot
        change (LayerNorm, heads inside the trunk), or a permutation of the trunk is not seen in activations.
    SpecMismatchError
        As :func:`match_trunks`.
    CalibrationError
        As :func:`fedrebasin.activation_matching`.

    References
    ----------
    Stoica et al. (ICLR 2024), "ZipIt! Merging models from different tasks without training", Sections 4.1 and 4.2.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (2, 5)]
    >>> specs = [trace(net, (torch.randn(2, 4),)) for net in nets]
    >>> states = [net.state_dict() for net in nets]
    >>> one, other = zip_trunks(specs, nets[0], states, [torch.randn(100, 4)], until="0")
    >>> bool((one["0.weight"] == other["0.weight"]).all()), other["2.weight"].shape
    (True, torch.Size([5, 8]))
    """
    if len(specs) != 2 or len(models) != 2:
        raise RebasinError(f"models: expected two, and a spec for each; got {len(models)} and {len(specs)} specs")
    weights = check_coefficients(coefficients, 2)
    for place, (spec, model) in enumerate(zip(specs, models, strict=True)):
        refuse_complex(spec.parameters, model, f"models[{place}]", "where units are zipped", "use merge_trunks")
    names = check_trunks(specs, models, until)
    common = common_perms(specs[0], specs[1], names)
    trunks = [
        spec.fix(*(perm for perm in spec.perm_shapes if perm not in free), reason="not free in both")
        for spec, free in zip(specs, (set(common), set(common.values())), strict=True)
    ]
    trunk, other_trunk = (one.only(names, fix=False) for one in trunks)
    check_can_resize(trunk)
    check_can_resize(other_trunk)
    guest = {name: models[1][name].to(tensor) if name in names else tensor for name, tensor in models[0].items()}
    batches = list(calibration)
    blocks = [
        measure_similarity(specs[0], net, one, other, batches, device=device)
        for one, other in ((models[0], models[0]), (models[0], guest), (guest, guest))
    ]
    writes, reads = _maps(trunk, blocks, weights)
    shared = {}
    for name in names:
        tensors = [
            _mapped(trunk, name, model[name], *maps, weight)
            for model, weight, maps in zip(models, weights, zip(writes, reads, strict=True), strict=True)
        ]
        shared[name] = tensors[0] + tensors[1] if models[0][name].is_floating_point() else models[0][name]
    results = []
    for place, (spec, model) in enumerate(zip(specs, models, strict=True)):
        own = {common[perm] if place else perm: matrix for perm, matrix in reads[place].items()}
        state = {name: shared[name] if name in names else _read(spec, name, model[name], own) for name in model}
        results.append(like_state(model, {name: state[name].to(tensor).clone() for name, tensor in model.items()}))
    return results


def _maps(
    trunk: PermutationSpec, blocks: Sequence[Mapping[Key, Similarity]], weights: Sequence[float]
) -> tuple[list[Maps], list[Maps]]:
    """For each model what writes the groups' units as a mixture of its own, and what reads its own from them.

    ``blocks`` hold the correlations within the first model, across, and within the other.
    """
    writes: list[Maps] = [{}, {}]
    reads: list[Maps] = [{}, {}]
    for perm, shape in trunk.perm_shapes.items():
        if any((perm, None) not in block for block in blocks):
            raise RebasinError(f"until: no layer shows the units of {perm!r}, which cannot be zipped; use merge_trunks")
        within, across, other = (block[perm, None].total for block in blocks)
        member = _groups(torch.cat([torch.cat([within, across], 1), torch.cat([across.T, other], 1)]), shape[0])
        shares = member * torch.tensor(weights, dtype=torch.float64, device="cpu").repeat_interleave(shape[0])
        alone = shares.sum(1, keepdim=True) <= 0  # a group of units of a model without weight
        shares = torch.where(alone, member, shares)
        shares /= shares.sum(1, keepdim=True)
        for place in (0, 1):
            here = slice(place * shape[0], (place + 1) * shape[0])
            writes[place][perm], reads[place][perm] = shares[:, here], member[:, here]
    return writes, reads


def _groups(correlation: Tensor, count: int) -> Tensor:
    """Merge the two most alike groups until ``count`` are left; returns which unit is in which: 0 or 1.

    Correlations are sums over places. With itself a unit has 1 for each place where it is alive, so that a unit that
    is silent behind its ReLU is still as much like its copy as can be.
    """
    places = correlation.diagonal().double()
    scale = torch.where(places > 0, places.rsqrt(), 0.0)
    scores, size = correlation.double() * scale.unsqueeze(1) * scale, len(correlation)
    scores.fill_diagonal_(-torch.inf)
    member = torch.eye(size, dtype=torch.float64, device="cpu")
    for _ in range(size - count):
        one, other = divmod(int(scores.argmax()), size)
        scores[one] = scores[:, one] = torch.minimum(scores[one], scores[other])
        scores[other] = scores[:, other] = -torch.inf
        member[one] += member[other]
        member[other] = 0
    return member[member.any(1)]


def _mapped(spec: PermutationSpec, name: str, tensor: Tensor, writes: Maps, reads: Maps, weight: float) -> Tensor:
    """A model's part of the trunk's tensor; the shares of both sum to one along the axes that are written."""
    if not tensor.is_floating_point():
        return tensor
    read, written, new = read_axis(spec, name), False, tensor.detach().double().cpu()
    for dim, layout in enumerate(spec.axes[name]):
        new = map_axis(new, dim, layout, layout, reads if dim == read else writes)
        written |= dim != read and any(isinstance(leaf, Free) and leaf.perm in writes for leaf in leaves(layout))
    return new if written else weight * new


def _read(spec: PermutationSpec, name: str, tensor: Tensor, reads: Maps) -> Tensor:
    """A tensor of the head, which reads a group's unit once for each of its own units."""
    if not tensor.is_floating_point():
        return tensor
    new = tensor.detach().double().cpu()
    for dim, layout in enumerate(spec.axes[name]):
        moved = any(isinstance(leaf, Free) and leaf.perm in reads for leaf in leaves(layout))
        if moved and dim != read_axis(spec, name):
            raise RebasinError(
                f"until: {name!r} of the head, used by {spec.uses.get(name, 'no op')}, belongs to units of the trunk "
                "and does not read them alone; share it too, with a later until"
            )
        new = map_axis(new, dim, layout, layout, reads)
    return new
