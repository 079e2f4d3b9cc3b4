"""The bench of corrections by clients and calibration data: its rows, its table, its command line."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedrebasin.simulations.bench import calibration, tables, tables_distance
from fedrebasin.simulations.bench.clients import calibrations
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.disjoint_bench import CORRECTIONS
from fedrebasin.simulations.results import load_results

pytestmark = pytest.mark.filterwarnings("ignore:calibration")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("calibration")
    words = "digits --width 6 --epochs 1 --nodes 2,3 --seeds 0,1 --images 20,90 --other-images 30".split()
    words += ["--skip", "distill,least-squares+distill", "--priors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *words, "--ends", str(folder / "ends"), "--output", str(folder)])
        calibration.main()
    assert len(list((folder / "ends").iterdir())) == 10
    return load_results(folder / "results.json")


def test_every_correction_is_measured_on_every_calibration_set_aligned_and_not(results: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    sets = {(row["source"], row["images"]) for row in results["rows"] if row["correction"]}
    assert sets == {("own", 20), ("own", 90), ("noise", 30)}
    names = {row["correction"] for row in results["rows"]}
    assert names == {
        "",
        "repair",
        "rescale",
        "reshift",
        "closed-form",
        "least-squares",
        "regmean",
        "least-squares-probabilities",
    }
    assert len(results["rows"]) == 2 * 2 * 3 * (1 + 3 * 7)
    assert len({json.dumps(row["loss"]) for row in results["rows"] if not row["correction"]}) == 12
    for one in results["references"]:
        assert len(one["examples"]) == one["clients"] and sum(one["examples"]) == 1347
        best = min(one["rows"][f"client {place}"]["loss"] for place in range(one["clients"]))
        assert one["rows"]["best client"]["loss"] == best


def test_the_table_has_a_column_for_each_set_and_the_references_below(results: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    columns, rows = tables.calibration(results)
    expected = ["2 clients, 20 own", "2 clients, 90 own", "2 clients, 30 noise", "3 clients, 90 own"]
    assert columns == ["test loss / top-1 %", *expected]
    table = {row[0]: row[1:] for row in rows}
    assert table["plain average"][0] == table["plain average"][1] != table["plain average"][3]
    assert table["plain average + repair"][0] != table["plain average + repair"][1]
    assert list(table)[-1] == "ensemble of probabilities"
    losses = [
        row["loss"]
        for row in results["rows"]
        if (row["clients"], row["alignment"], row["correction"]) == (3, "aligned", "regmean")
        and (row["source"], row["images"]) == ("own", 90)
    ]
    assert table["**aligned average + regmean**"][3].startswith(f"{sum(losses) / 2:.3f} ± ")


def test_a_reference_that_an_older_file_lacks_is_a_dash_there(results: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    older = copy.deepcopy(results)
    for one in older["references"]:
        if one["clients"] == 3:
            del one["rows"]["ensemble of probabilities"]
    table = {row[0]: row[1:] for row in tables.calibration(older)[1]}
    assert table["ensemble of probabilities"][3] == "-" != table["ensemble of probabilities"][0]


def test_rows_that_two_files_hold_count_once(results: dict[str, list[dict]]) -> None:  # type: ignore[type-arg]
    twice = {name: rows + copy.deepcopy(rows) if isinstance(rows, list) else rows for name, rows in results.items()}
    assert tables.calibration(twice) == tables.calibration(results)


def test_the_distance_is_to_the_better_ensemble_seed_by_seed_and_the_first_of_equal_rows_counts() -> None:
    def run(top1: float) -> dict[str, object]:
        cases = [{"clients": 2, "seed": seed} for seed in (0, 1)]
        row = {"alignment": "aligned", "correction": "least-squares", "source": "own", "images": 100}
        references = [
            {"ensemble of logits": {"top1": logits}, "ensemble of probabilities": {"top1": probabilities}}
            for logits, probabilities in ((0.9, 0.95), (0.8, 0.7))
        ]
        return {
            "config": {"dataset": "cifar10", "width": 8},
            "rows": [{**case, **row, "top1": top1 + case["seed"] / 100} for case in cases],
            "references": [{**case, "rows": rows} for case, rows in zip(cases, references, strict=True)],
        }

    columns, (plain, aligned) = tables_distance.distance([run(0.6), run(0.1)])
    assert columns[1] == "100 own" and plain[1] == "- / -"
    assert aligned[:2] == ["**cifar10, conv of width 8, 2 clients, aligned**", "24.5 ± 7.8 / -"]


def test_the_model_may_be_another_than_the_data_sets_usual_one(tmp_path: Path) -> None:
    words = "digits --model conv --width 4 --epochs 1 --nodes 2 --seeds 0 --images 30 --other-images 10".split()
    skipped = ",".join(name for name in CORRECTIONS if name and name != "reset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["x", *words, "--skip", skipped, "--ends", str(tmp_path / "ends"), "--output", str(tmp_path)]
        )
        calibration.main()
    found = load_results(tmp_path / "results.json")
    assert found["config"]["model"] == "conv"
    assert {row["correction"] for row in found["rows"]} == {"", "reset"}  # BatchNorm, which the mlp has not
    assert len(list((tmp_path / "ends").glob("*-conv4-*"))) == 2


def test_the_command_names_no_local_folder(results: dict[str, dict[str, str]]) -> None:
    command = results["provenance"]["command"]
    assert "--other-images 30 --skip distill,least-squares+distill --priors" in command
    assert command.endswith("--ends FOLDER --output FOLDER")
    assert str(Path.home()) not in command and "/" not in command


def test_copies_are_augmented_images_of_the_own_ones() -> None:
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10)
    data = Dataset("cifar10", "made", 10, True, images, labels, images, labels, (128.0,) * 3, (64.0,) * 3)
    bench = SimpleNamespace(data=data, images={"calibration": images[:8]}, batch=4)
    clients = SimpleNamespace(bench=bench)
    options = SimpleNamespace(images=[4, 8], copies=3, sources=[])
    sets = list(calibrations(clients, options))  # type: ignore[arg-type]
    assert [(source, sum(map(len, batches))) for source, batches in sets] == [("own", 4), ("own", 8), ("augmented", 24)]
    own, copies = (torch.cat(batches) for _, batches in sets[1:])
    assert not torch.equal(copies[:8], copies[8:16])
    centres = {tuple(image.flatten().tolist()) for image in own}
    assert not centres.issuperset(tuple(image.flatten().tolist()) for image in copies)
    assert set(copies.unique().tolist()) <= {*own.unique().tolist(), 0.0}


def test_copies_of_a_data_set_that_is_not_augmented_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["x", "digits", "--copies", "2", "--output", "nowhere"])
        calibration.main()
    assert "--copies: digits is not augmented; choose cifar10 or cifar100" in capsys.readouterr().err
