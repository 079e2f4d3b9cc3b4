"""Two networks compared layer by layer, on what their layers write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches, copied
from fedrebasin.corrections.working import load, working_copy
from fedrebasin.diagnostics.measures import MEASURES, Measure
from fedrebasin.errors import CalibrationError, RebasinError
from fedrebasin.layout import Layout
from fedrebasin.matching.places import Watch
from fedrebasin.spec import PermutationSpec

_WRITES = " writes"


@torch.no_grad()
def layer_similarity(
    spec: PermutationSpec,
    net: nn.Module,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    measure: str = "correlation",
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """How alike two networks' layers respond to the same data, one number for each layer.

    Seen is what each layer with a weight writes, before norm and nonlinearity. Only ``"correlation"`` compares unit
    with unit, and changes when ``model`` is aligned; the others do not see the order of units: where they call two
    layers alike and the correlation does not, alignment has something to find.

    Parameters
    ----------
    spec : PermutationSpec
    net : nn.Module
        Of the architecture; its own weights are not used.
    reference, model : dict of str to Tensor
        State dicts; neither is changed.
    batches : iterable of batches
        Inputs; targets are not used. Read once; of one batch all layers' activations are held.
    measure : {"correlation", "cka", "procrustes", "relative"}
        :func:`unit_correlation`, :func:`linear_cka` (smaller batches than 4 are left out), :func:`procrustes_distance`
        (small where layers are alike) or :func:`relative_similarity` (anchors: the first batch).
    device : str, optional

    Returns
    -------
    dict of str to float
        By layer, in the order in which they run.

    Raises
    ------
    RebasinError
        If there is no such measure.
    CalibrationError
        If the two networks run different layers, or activations are not finite.

    References
    ----------
    See the functions above.

    Examples
    --------
    >>> from fedrebasin import permute, random_perms, trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec, state, data = trace(net, (torch.randn(2, 4),)), net.state_dict(), [torch.randn(50, 4)]
    >>> moved = permute(spec, random_perms(spec, 1), state)
    >>> round(layer_similarity(spec, net, state, moved, data, measure="cka")["0"], 3)
    1.0
    >>> layer_similarity(spec, net, state, moved, data)["0"] < 0.9
    True
    """
    if measure not in MEASURES:
        raise RebasinError(f"measure: expected one of {', '.join(MEASURES)}; got {measure!r}")
    return layer_similarities(spec, net, reference, model, batches, measures=(measure,), device=device)[measure]


@torch.no_grad()
def layer_similarities(
    spec: PermutationSpec,
    net: nn.Module,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    measures: Sequence[str],
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float]]:
    """Several measures of :func:`layer_similarity` in one pass over the data."""
    first = working_copy(net, reference, device)
    second = working_copy(net, reference, device)
    load(second, model)
    where = device if device is not None else next(iter(reference.values()), torch.zeros(0, device="cpu")).device
    sums: dict[str, dict[str, Measure]] = {}
    for args, kwargs, _ in Batches(batches, inputs=spec.inputs, name="batches", device=where):
        seen = _written(spec, first, args, kwargs), _written(spec, second, args, kwargs)
        if [(name, one.shape) for name, one in seen[0]] != [(name, one.shape) for name, one in seen[1]]:
            raise CalibrationError(
                "batches: the two networks run different layers on the same inputs; give batches on which they do not"
            )
        for (name, one), (_, other) in zip(*seen, strict=True):
            if not bool(one.isfinite().all() and other.isfinite().all()):
                raise CalibrationError(
                    f"batches: what {name!r} writes holds a NaN or an infinity; check the models and the inputs"
                )
            if name not in sums:
                sums[name] = {key: MEASURES[key]() for key in measures}
            for measure in sums[name].values():
                measure.add(one, other)
    return {key: {name: found[key].value() for name, found in sums.items()} for key in measures}


def _written(spec: PermutationSpec, net: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """What each layer writes in one forward pass, units first, then examples."""
    seen: list[tuple[str, Tensor]] = []

    def see(name: str, layout: Layout, activations: Tensor) -> None:
        del layout
        if name.endswith(_WRITES):
            kept = activations.clone()  # the network may write over it
            seen.append((_layer(name.removesuffix(_WRITES)), kept if kept.ndim > 1 else kept.unsqueeze(1)))

    args, kwargs = copied((args, kwargs))  # the batch goes through both networks
    with Watch(net, spec, see):
        getattr(net, "_orig_mod", net)(*args, **kwargs)
    return seen


def _layer(place: str) -> str:
    """The module of a place's tensor; of attention also which projection.

    >>> _layer("block.fc.weight"), _layer("attention.in_proj_weight query"), _layer("weight")
    ('block.fc', 'attention query', 'weight')
    """
    tensor, _, projection = place.partition(" ")
    owner = tensor.rpartition(".")[0] or tensor
    return f"{owner} {projection}".strip()
