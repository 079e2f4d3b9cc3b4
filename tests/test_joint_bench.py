"""The benchmark of joint methods on trained clients, at a tiny size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedrebasin.matching.many import MANY_METHODS
from fedrebasin.simulations.bench import joint, tables
from fedrebasin.simulations.results import load_results


def test_every_method_is_measured_with_and_without_the_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "digits --width 6 --epochs 1 --nodes 2,3 --seeds 0,1 --images 120".split()
    monkeypatch.setattr(sys, "argv", ["x", *words, "--ends", str(tmp_path / "ends"), "--output", str(tmp_path)])
    joint.main()
    results = load_results(tmp_path / "results.json")
    assert len(results["rows"]) == 2 * 2 * 2 * (1 + len(MANY_METHODS))
    assert all(row["gain"] >= -1e-6 for row in results["rows"] if row["method"] == "merge-many")
    assert str(tmp_path) not in results["provenance"]["command"]
    columns, rows = tables.joint(results)
    assert columns[1:] == ["2 clients", "3 clients"]
    plain = [row for row in results["rows"] if (row["clients"], row["method"], row["correction"]) == (3, "", "")]
    mean = sum(row["loss"] for row in plain) / len(plain)
    assert rows[0][2].startswith(f"{mean:.3f}")
    assert [row[0] for row in rows][-1] == "ensemble of probabilities"
