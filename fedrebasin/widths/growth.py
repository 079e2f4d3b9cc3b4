"""Matched averaging that grows: a unit that is like none of the global model's becomes one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedrebasin.coefficients import check_coefficients
from fedrebasin.errors import RebasinError
from fedrebasin.layout import axis_mask
from fedrebasin.permute import like_state
from fedrebasin.resizable import check_can_resize, read_axis
from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.maps import WidthMatching, resize
from fedrebasin.widths.resized import Resized, with_units
from fedrebasin.widths.some import match_some


def matched_averaging(
    specs: Sequence[PermutationSpec],
    models: Sequence[Mapping[str, Tensor]],
    *,
    coefficients: Sequence[float] | None = None,
    threshold: float = 0.5,
) -> Resized:
    """Average networks unit by unit, and let the average have units that only some of them have.

    The heaviest model is the first global model. Each other one, the heavier first, is matched to it by rectangular
    assignments that may leave units out; those become new global units. A unit of the result is the mean, by
    coefficients, of the units matched to it, each of which reads zero from what its model lacks. So models that are
    alike grow nothing, and models that share no unit give their ensemble: the weighted mean of their outputs.

    As in FedMA, layers are matched in forward order by what writes their units. It differs in this: nothing is trained
    between layers, the models are visited once, and the price of a new unit does not depend on how many models share
    the old ones or on how many units are new (FedMA's beta-Bernoulli prior).

    Parameters
    ----------
    specs : sequence of PermutationSpec
        One for each model; the widths may differ. Checked: only then a softmax or a mean over units is seen.
    models : sequence of dict of str to Tensor
        State dicts; none is changed.
    coefficients : sequence of float, optional
        Averaging weights, scaled to sum 1; equal by default. A model of weight zero adds no units.
    threshold : float, in [0, 2]
        The largest squared distance between a unit and the global unit that it joins, as a share of the sum of their
        squared lengths. 0: nothing is shared. 0.5: FedMA's price where the units of all networks spread as widely as
        one network's unit does around its global one (``sigma = sigma0``, two models, without its prior on counts).
        1: a pair must be more alike than orthogonal ones. 2: a unit is new only where none is left for it.

    Returns
    -------
    Resized

    Raises
    ------
    RebasinError
        If a parameter is out of range; if heads or groups of inner units, or layers that look at all units at once
        (LayerNorm), are in the network, weights are complex, or nobody knows how some op reads its weight.
    SpecMismatchError
        If the networks are not of one kind, or a state dict does not fit or holds a NaN or an infinity.

    References
    ----------
    Wang et al. (ICLR 2020), "Federated Learning with Matched Averaging", Algorithm 1; its price of a new unit is that
    of Yurochkin et al. (ICML 2019), "Bayesian Nonparametric Federated Learning of Neural Networks".

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> spec, state = trace(net, (torch.randn(2, 2),)), net.state_dict()
    >>> matched_averaging([spec, spec], [state, state]).units
    {'0': 3}
    >>> matched_averaging([spec, spec], [state, state], threshold=0).units
    {'0': 6}
    """
    weights = check_coefficients(coefficients, len(models))
    if len(specs) != len(models):
        raise RebasinError(f"specs: expected one for each model; got {len(specs)} for {len(models)} models")
    if not 0 <= threshold <= 2:
        raise RebasinError(f"threshold: expected a number from 0 (share nothing) to 2 (grow nothing); got {threshold}")
    for spec in specs:
        check_can_resize(spec)
    first, *others = sorted(range(len(models)), key=lambda place: -weights[place])
    doubles = [{k: v.double() if v.is_floating_point() else v for k, v in model.items()} for model in models]
    specs[first].check_state(doubles[first], f"models[{first}]")
    grown, state = replace(specs[first], checked=False), doubles[first]
    maps = {first: {perm: _places(shape[0], shape[0]) for perm, shape in grown.perm_shapes.items()}}
    for place in others:
        pairs = match_some(grown, specs[place], state, doubles[place], threshold=threshold)
        if weights[place] > 0:
            pairs = {perm: _with_the_unmatched(matrix) for perm, matrix in pairs.items()}
        wider = {perm: _places(len(matrix), grown.perm_shapes[perm][0]) for perm, matrix in pairs.items()}
        for own in maps.values():
            own.update({perm: _padded(own[perm], len(matrix)) for perm, matrix in pairs.items()})
        before, grown = grown, with_units(grown, {perm: len(matrix) for perm, matrix in pairs.items()})
        state = resize(WidthMatching(grown, before, wider, wider), state)
        shares = [(WidthMatching(grown, specs[done], own, own), weights[done]) for done, own in maps.items()]
        state = _join(state, shares, WidthMatching(grown, specs[place], pairs, pairs), doubles[place], weights[place])
        maps[place] = pairs
    state = {name: state[name].to(tensor) for name, tensor in models[first].items()}
    found = [WidthMatching(grown, specs[place], maps[place], maps[place]) for place in range(len(models))]
    return Resized(grown, like_state(models[first], state), found)


def _places(units: int, kept: int) -> Tensor:
    """The first units of a layer are those of a narrower one."""
    return torch.eye(units, kept, dtype=torch.float64, device="cpu")


def _padded(pairs: Tensor, units: int) -> Tensor:
    return torch.cat([pairs, pairs.new_zeros(units - len(pairs), pairs.shape[1])])


def _with_the_unmatched(pairs: Tensor) -> Tensor:
    return torch.cat([pairs, _places(pairs.shape[1], pairs.shape[1])[~pairs.any(0)]])


def _join(
    state: Mapping[str, Tensor],
    shares: Sequence[tuple[WidthMatching, float]],
    matching: WidthMatching,
    model: Mapping[str, Tensor],
    weight: float,
) -> dict[str, Tensor]:
    """Add a model to the average so far, unit by unit: one that writes a unit counts, and reads zero what it lacks."""
    fitted, result = resize(matching, model), dict(state)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            before = sum((share * _written(earlier, name) for earlier, share in shares), torch.zeros((), device="cpu"))
            own = weight * _written(matching, name)
            result[name] = (before * tensor.cpu() + own * fitted[name].cpu()) / (before + own)
    return result


def _written(matching: WidthMatching, name: str) -> Tensor:
    """1 where the model has the units that a tensor writes, else 0; of size 1 along the axis that it reads."""
    spec, counts = matching.reference_spec, torch.ones((), dtype=torch.float64, device="cpu")
    read = read_axis(spec, name)
    for dim, layout in enumerate(spec.axes[name]):
        mask = axis_mask(layout, matching.present) if dim != read else torch.ones(1, device="cpu")
        counts = counts.unsqueeze(-1) * mask.double()
    return counts
