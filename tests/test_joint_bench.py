"""The bench of joint methods: its rows for every method and growth, its splits, its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedrebasin.matching.many import MANY_METHODS
from fedrebasin.simulations.bench import joint, tables
from fedrebasin.simulations.results import load_results

pytestmark = pytest.mark.filterwarnings("ignore:calibration")


def run(folder: Path, words: str) -> dict[str, list[dict]]:  # type: ignore[type-arg]
    with pytest.MonkeyPatch.context() as patch:
        given = f"digits --width 6 --epochs 1 --seeds 0,1 --images 60 {words}".split()
        patch.setattr(sys, "argv", ["x", *given, "--ends", str(folder / "ends"), "--output", str(folder)])
        joint.main()
    return load_results(folder / "results.json")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:  # type: ignore[type-arg]
    return run(tmp_path_factory.mktemp("joint"), "--nodes 2,3")


def test_every_method_and_growth_is_measured_and_growth_says_how_wide_it_became(results: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    growth = [f"growth, threshold {threshold:g}" for threshold in joint.THRESHOLDS]
    assert list(dict.fromkeys(row["method"] for row in results["rows"])) == ["", *MANY_METHODS, *growth]
    for row in results["rows"]:
        assert ("width" in row) == (row["method"] in growth)
        assert 6 <= row.get("width", 6) <= 6 * row["clients"]
        assert not row["correction"] or row.get("width", 6) <= 12
    for clients, seed in ((2, 0), (3, 1)):
        own = [
            row for row in results["rows"] if (row["clients"], row["seed"], row["correction"]) == (clients, seed, "")
        ]
        widths = [row["width"] for row in own if "width" in row]
        assert widths[0] > widths[2] and sorted(widths, reverse=True) == widths


def test_ends_of_a_split_have_its_name_and_todays_splits_have_todays_names(tmp_path: Path) -> None:
    run(tmp_path, "--nodes 2 --split dirichlet:0.1")
    names = {path.name.partition("-mlp")[0] for path in (tmp_path / "ends").iterdir()}
    assert names == {"dirichlet0.1-2-0", "dirichlet0.1-2-1"}
    results = run(tmp_path, "--nodes 2 --split biased:0.2")
    names |= {"a", "b"}
    assert names == {path.name.partition("-mlp")[0] for path in (tmp_path / "ends").iterdir()}
    assert {row["split"] for row in results["rows"]} == {"biased:0.2"}
    with pytest.raises(SystemExit):
        run(tmp_path, "--nodes 2 --split nope")


def test_the_table_has_a_column_for_each_split_and_the_widths(results: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    columns, rows = tables.joint(results)
    assert columns == ["average; corrected; CPU seconds", "2 clients, biased:0.2", "3 clients, dirichlet:0.5"]
    table = {row[0]: row[1:] for row in rows}
    assert list(table)[-1] == "ensemble of probabilities"
    assert all("; width " in cell for cell in table["**growth, threshold 0.5**"])
    old = {**results, "rows": [{k: v for k, v in row.items() if k != "split"} for row in results["rows"]]}
    assert tables.joint(old)[1][0] == rows[0]  # results of before the option
