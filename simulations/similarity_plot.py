"""How alike two networks' units respond to data, layer by layer, before and after alignment: numbers and picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedrebasin.diagnostics.layers import layer_similarities
from fedrebasin.simulations.plots import Panel, Series
from fedrebasin.simulations.results import summarise
from fedrebasin.spec import PermutationSpec

Pair = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
#: layers that have a name under the axis; of more every second, third and so on
_NAMED = 40
#: line -> name in the legend, style
_LINES = {
    "aligned": ("unit with unit, aligned", 0),
    "plain": ("unit with unit, as they came", 1),
    "cka": ("layer with layer, whatever the order of units (CKA)", 2),
}


def similarities(
    spec: PermutationSpec, net: nn.Module, before: Pair, after: Pair, batches: Iterable[Any]
) -> dict[str, dict[str, float]]:
    """Compare two networks as they came and aligned: for each line of the picture a number for each layer.

    Parameters
    ----------
    before, after : pair of state dicts
    batches : iterable
        Read twice.
    """
    plain = layer_similarities(spec, net, *before, batches, measures=("correlation", "cka"))
    aligned = layer_similarities(spec, net, *after, batches, measures=("correlation",))
    return {"aligned": aligned["correlation"], "plain": plain["correlation"], "cka": plain["cka"]}


def similarity_panel(
    found: Sequence[Mapping[str, Mapping[str, float | None]]], title: str = "How alike layers respond to data"
) -> Panel:
    """The lines of one pair of networks, or of several their mean, and their standard deviation as a band.

    >>> panel = similarity_panel([{line: {"fc1": 0.1, "fc2": 0.4} for line in ("aligned", "plain", "cka")}])
    >>> panel.names, [series.label for series in panel.series][:2]
    (['fc1', 'fc2'], ['unit with unit, aligned', 'unit with unit, as they came'])
    """
    layers = list(found[0]["plain"])
    series = []
    for line, (label, style) in _LINES.items():
        points = [summarise([pair[line][layer] for pair in found]) for layer in layers]
        spread = [point[1] for point in points]
        series.append(Series(label, range(len(layers)), [point[0] for point in points], spread, style))
    every = -(-len(layers) // _NAMED)
    more = f", mean of {len(found)} pairs" if len(found) > 1 else ""
    return Panel(
        title=f"{title}{more}",
        xlabel="layer, in the order in which they run",
        ylabel="correlation; CKA",
        series=series,
        ticks=range(0, len(layers), every),
        names=layers[::every],
    )
