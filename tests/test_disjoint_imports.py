"""The experiment runs where neither Flower nor datasets, torchvision, scikit-learn, pandas or jinja2 are installed."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from fedrebasin.simulations.results import load_results

#: every finder of modules forgets these packages (an error in its place would not be what a missing package looks
#: like: torch asks which ones there are), then the command
RUN = """
import sys

ABSENT = ("flwr", "flwr_datasets", "datasets", "torchvision", "sklearn", "pandas", "jinja2", "ray", "grpc")


class Forgetful:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Forgetful(finder) for finder in sys.meta_path]
from fedrebasin.simulations.cli import run

sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Images of noise in the layout of CIFAR-100, but fewer; enough of every class for both halves to have some."""
    folder, generator = tmp_path_factory.mktemp("cifar100"), np.random.default_rng(0)
    for split, count in (("train", 1000), ("test", 100)):
        cells = []
        for pixels in generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="png")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": cells, "fine_label": [label % 100 for label in range(count)]})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def command(*words):
    process = subprocess.run([sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(("model", "norm", "width"), [("resnet20", "layer", "1"), ("conv", "batch", "4")])
def test_a_run_on_parquet_files_needs_none_of_them(cifar, tmp_path, model, norm, width):
    words = (
        f"--model {model} --width {width} --epochs 1 --lams 3 --corrected-lams 2 --calibration 20 --device cpu".split()
    )
    words += ["--corrections", "repair" if norm == "layer" else "repair,reset", "--augment", "zoom", "--held", 0.5]
    status, _, errors = command(
        "reproduce", "disjoint", "cifar100", "--data", cifar, "--norm", norm, *words, "--output", tmp_path
    )
    assert status == 0, errors
    assert "results.json is complete, and plots and page can be drawn from it later" in errors and "jinja2" in errors
    results = load_results(tmp_path / "results.json")
    assert {"plain", "aligned", "aligned+repair", "ensemble-logits", "all"} <= set(results["seeds"][0]["rows"])
    assert set(results["seeds"][0]["images-per-second"]) == {"a", "b", "all"}
    assert {path.name for path in tmp_path.glob("*.png")} >= {"test-loss.png", "test-top1.png", "reliability.png"}


def test_what_is_not_there_is_named_by_the_commands_that_need_it():
    status, _, errors = command("reproduce", "disjoint", "digits")
    assert status == 2 and "digits need scikit-learn" in errors
