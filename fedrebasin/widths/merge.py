"""The average of networks of different widths, which gives each network one of its own width back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.coefficients import check_coefficients
from fedrebasin.errors import RebasinError
from fedrebasin.layout import axis_mask
from fedrebasin.permute import like_state
from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.maps import WidthMatching, resize
from fedrebasin.widths.matching import match_widths


def merge_widths(
    specs: Sequence[PermutationSpec],
    models: Sequence[Mapping[str, Tensor]],
    *,
    coefficients: Sequence[float] | None = None,
    unmatched: str = "pad",
    fold_above: float = 0.9,
) -> list[dict[str, Tensor]]:
    """Average networks of one kind and different widths; each gets the average back in its own width.

    All are matched to the widest (of several, the heaviest), whose width the average has. An entry of
    a tensor is averaged, by their coefficients, over the models that have all of its units. A narrower model gets
    back the units that its own were matched to; with ``"transport"`` it gets something of all units.

    Parameters
    ----------
    specs : sequence of PermutationSpec
        One for each model.
    models : sequence of dict of str to Tensor
        State dicts; none is changed.
    coefficients : sequence of float, optional
        Averaging weights, scaled to sum 1; equal by default.
    unmatched, fold_above
        As for :func:`match_widths`.

    Returns
    -------
    list of dict of str to Tensor
        One for each model, with its shapes, keys, dtypes and devices; integer buffers are its own.

    Raises
    ------
    RebasinError
        If there is not one spec for each model, or coefficients do not fit; as :func:`match_widths` raises.

    References
    ----------
    Averaging units over those who have them is HeteroFL's rule: Diao, Ding, Tarokh (ICLR 2021), "HeteroFL".

    Examples
    --------
    >>> from fedrebasin import trace
    >>> nets = [torch.nn.Sequential(torch.nn.Linear(2, n), torch.nn.Linear(n, 1)) for n in (5, 3)]
    >>> specs = [trace(net, (torch.randn(2, 2),)) for net in nets]
    >>> [state["0.weight"].shape[0] for state in merge_widths(specs, [net.state_dict() for net in nets])]
    [5, 3]
    """
    weights = check_coefficients(coefficients, len(models))
    if len(specs) != len(models):
        raise RebasinError(f"specs: expected one for each model; got {len(specs)} for {len(models)} models")
    widths = [sum(math.prod(shape) for shape in spec.shapes.values()) for spec in specs]
    widest = max(range(len(models)), key=lambda place: (widths[place], weights[place]))
    matchings = [
        match_widths(specs[widest], spec, models[widest], model, unmatched=unmatched, fold_above=fold_above)
        for spec, model in zip(specs, models, strict=True)
    ]
    merged = average(matchings, models, weights)
    results = []
    for matching, model in zip(matchings, models, strict=True):
        own = resize(matching.inverse(), like_state(merged, dict(merged)))
        fitted = {
            name: own[name].to(tensor) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in model.items()
        }
        results.append(like_state(model, fitted))
    return results


def average(
    matchings: Sequence[WidthMatching], models: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """The average in the width of the matchings' common reference, by the rule of :func:`merge_widths`."""
    fitted = [resize(matching, model) for matching, model in zip(matchings, models, strict=True)]
    heaviest = fitted[max(range(len(models)), key=lambda place: coefficients[place])]
    result = {}
    for name, tensor in fitted[0].items():
        if not tensor.is_floating_point():
            result[name] = heaviest[name]
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        weight = torch.zeros_like(total)
        for matching, state, coefficient in zip(matchings, fitted, coefficients, strict=True):
            counts = coefficient * counts_of(matching, name).to(total)
            total += counts * state[name].to(total)
            weight += counts
        alone = total if not name.endswith("running_var") else torch.ones_like(total)
        result[name] = torch.where(weight > 0, total / weight.clamp_min(1e-300), alone).to(tensor.dtype)
    return like_state(fitted[0], result)


def counts_of(matching: WidthMatching, name: str) -> Tensor:
    """Where the model has a say in a tensor of the reference's shape: 1, else 0."""
    counts = torch.ones((), dtype=torch.float64, device="cpu")
    for layout in matching.reference_spec.axes[name]:
        counts = counts.unsqueeze(-1) * axis_mask(layout, matching.present).double()
    return counts
