"""The plot of a comparison: one line for each strategy over the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedrebasin.simulations.plot_scales import wants_nines
from fedrebasin.simulations.plots import Panel, Series, save_lines

Stats = Sequence[tuple[float, float, int]]
_PLAIN, _OURS = 1, 0  # as in the plots of the disjoint experiment


def save_rounds(
    path: Path,
    title: str,
    ylabel: str,
    stats: Mapping[str, Stats],
    hlines: Sequence[tuple[str, float]],
    *,
    percent: bool,
    sent: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw means over rounds from 1, with bands of standard deviations, and baselines as horizontal lines.

    Parameters
    ----------
    stats : mapping of str to sequence of tuple
        Label of a strategy -> mean, standard deviation and n of every round.
    sent : mapping of str to sequence of float, optional
        Label of a strategy -> millions of bytes sent up to the end of every round: the x axis instead of the round.
    """
    rounds = list(range(1, 1 + max(map(len, stats.values()))))
    styles = styles_of(list(stats))
    lines = [
        Series(
            label,
            sent[label] if sent else rounds,
            [mean for mean, _, _ in found],
            [spread for _, spread, _ in found],
            styles[label],
        )
        for label, found in stats.items()
    ]
    shown = [mean for found in stats.values() for mean, _, _ in found] + [value for _, value in hlines]
    nines = percent and wants_nines(shown)
    ylabel += " (errors on a log axis)" if nines else ""
    xlabel, ticks = ("models and queries sent, both ways, MB", None) if sent else ("round", rounds)
    panel = Panel(title, xlabel, ylabel, lines, ticks=ticks, hlines=hlines, percent=percent, nines=nines)
    save_lines(path, [panel])


def styles_of(labels: Sequence[str]) -> dict[str, int]:
    """FedAvg looks like the plain average of every other plot, the first re-basin strategy like the aligned one.

    >>> styles_of(["FedAvg", "FedRebasin", "FedAdam", "FedRebasin + repair"])
    {'FedAvg': 1, 'FedRebasin': 0, 'FedAdam': 2, 'FedRebasin + repair': 3}
    """
    ours = next((label for label in labels if "Rebasin" in label), None)
    rest = iter(range(2, 2 + len(labels)))
    return {label: _OURS if label == ours else _PLAIN if label == "FedAvg" else next(rest) for label in labels}
