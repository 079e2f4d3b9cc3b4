"""Two widths in one federation, in Flower's real simulation runtime: each node gets back a model of its own."""

from __future__ import annotations

import pytest

from fedrebasin.simulations.bench.widths_rounds import Federation, play, rows_of


@pytest.mark.slow
def test_nodes_of_width_512_and_256_train_together_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    federation = Federation((512, 256), seed=0, rounds=2)
    played = play(federation)  # a node that got another width than its own could not load it, and would be left out
    assert [(row["left-out"], [node["node"] for node in row["nodes"]]) for row in played] == [(0, [0, 1])] * 3
    rows = rows_of(federation, played)
    assert [(row["width"], row["round"]) for row in rows] == [(512, 1), (512, 2), (256, 1), (256, 2)]
    for row in rows:
        assert min(row["sent-accuracy"], row["trained-accuracy"], row["alone-accuracy"]) > 0.85
    assert all(row["trained-loss"] == row["alone-loss"] for row in rows if row["round"] == 1)
    assert all(row["trained-loss"] != row["alone-loss"] for row in rows if row["round"] == 2)
