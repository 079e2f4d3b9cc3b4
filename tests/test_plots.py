"""What stands in the plots: styles that mean the same everywhere, and axes on which lines can be told apart."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedrebasin.simulations.plot_scales import NINES, from_nines, nines_scale, to_nines
from fedrebasin.simulations.plots import Panel, Series, save_lines
from fedrebasin.simulations.round_plots import save_rounds, styles_of


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or real(figure, *a, **k))
    return figures


def test_nines_and_shares_are_inverse():
    shares = np.array([0.0, 0.1, 0.5, 0.9, 0.995, 0.9999])
    assert from_nines(to_nines(shares)) == pytest.approx(shares)
    assert np.isfinite(to_nines(np.array([1.0]))).all()


def test_the_axis_of_nines_ends_just_beyond_its_lines():
    axis = Figure().subplots()
    axis.plot([1, 2], [0.1, 0.98])
    nines_scale(axis)
    low, high = axis.get_ylim()
    assert -0.1 < low < 0.1 and 0.98 < high < 0.985
    assert [tick for tick in NINES if low < tick < high] == [0.0, 0.5, 0.8, 0.9, 0.95, 0.98]


@pytest.mark.parametrize(("worst", "scale"), [(0.1, "function"), (0.95, "linear")])
def test_accuracies_by_round_are_drawn_by_their_nines_where_some_are_far_below(drawn, tmp_path, worst, scale):
    stats = {"FedAvg": [(worst, 0.0, 3), (0.97, 0.01, 3)], "FedRebasin": [(0.98, 0.0, 3), (0.985, 0.0, 3)]}
    save_rounds(tmp_path / "a.png", "test", "accuracy", stats, [("ensemble", 0.984)], percent=True)
    axis = drawn[0].axes[0]
    assert axis.get_yscale() == scale
    assert axis.get_ylim()[0] < worst and axis.get_ylim()[1] > 0.985


def test_accuracies_are_drawn_over_what_was_sent_where_that_is_given(drawn, tmp_path):
    stats = {"FedAvg": [(0.9, 0.0, 3), (0.97, 0.01, 3)], "FedAdam": [(0.8, 0.0, 3), (0.9, 0.0, 3)]}
    sent = {"FedAvg": [1.5, 4.0], "FedAdam": [2.5, 7.0]}
    save_rounds(tmp_path / "a.png", "test", "accuracy", stats, [], percent=True, sent=sent)
    axis = drawn[0].axes[0]
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [[1.5, 4.0], [2.5, 7.0]]
    assert "MB" in axis.get_xlabel()


def test_plain_and_aligned_look_the_same_in_every_plot():
    styles = styles_of(["FedAdam", "FedRebasin + repair", "FedAvg"])
    assert (styles["FedAvg"], styles["FedRebasin + repair"]) == (1, 0)
    assert len(set(styles.values())) == 3


def test_ticks_can_have_names_of_their_own(drawn, tmp_path):
    panel = Panel("a", "b", "c", [Series("d", [0, 1], [1, 2])], ticks=[0, 1], names=["64", "128"])
    save_lines(tmp_path / "a.png", [panel])
    assert [text.get_text() for text in drawn[0].axes[0].get_xticklabels()] == ["64", "128"]
