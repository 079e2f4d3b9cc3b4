"""The picture of ``fedrebasin merge --plot``: how alike units respond to data, before and after alignment, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedrebasin.diagnostics.layers import layer_similarities
from fedrebasin.perms import Perms
from fedrebasin.permute import permute
from fedrebasin.simulations.plots import Panel, Series, save_lines
from fedrebasin.simulations.results import summarise
from fedrebasin.spec import PermutationSpec

State = Mapping[str, Tensor]
#: layers that have a name under the axis; of more every second, third and so on
_NAMED = 40
#: label -> measure, whether of the aligned model, style
_LINES = {
    "unit with unit, aligned": ("correlation", True, 0),
    "unit with unit, as they came": ("correlation", False, 1),
    "layer with layer, whatever the order of units (CKA)": ("cka", False, 2),
}


def similarities(
    spec: PermutationSpec, net: nn.Module, states: Sequence[State], perms: Sequence[Perms], reference: int, data: Any
) -> dict[str, list[dict[str, float]]]:
    """For each line of the picture, and each model but the reference, a number for each layer."""
    found: dict[str, list[dict[str, float]]] = {label: [] for label in _LINES}
    aligned = [permute(spec, own, state) for own, state in zip(perms, states, strict=True)]
    for place in range(len(states)):
        if place != reference:
            sides = [
                layer_similarities(spec, net, ends[reference], ends[place], data, measures=("correlation", "cka"))
                for ends in (states, aligned)
            ]
            for label, (measure, after, _) in _LINES.items():
                found[label].append(sides[after][measure])
    return found


def draw(path: Path, found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw the lines into a PNG file; with several models their mean, and their standard deviation as a band.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "units.png"
    >>> draw(path, {label: [{"fc1": 0.1, "fc2": 0.4}] for label in _LINES})
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    first = next(iter(found.values()))
    layers = list(first[0])
    series = []
    for label, models in found.items():
        points = [summarise([model[layer] for model in models]) for layer in layers]
        spread = [point[1] for point in points]
        series.append(Series(label, range(len(layers)), [point[0] for point in points], spread, _LINES[label][2]))
    every = -(-len(layers) // _NAMED)
    more = f", mean of {len(first)} pairs" if len(first) > 1 else ""
    panel = Panel(
        title=f"How alike layers respond to data{more}",
        xlabel="layer, in the order in which they run",
        ylabel="correlation; CKA",
        series=series,
        ticks=range(0, len(layers), every),
        names=layers[::every],
    )
    save_lines(path, [panel])
