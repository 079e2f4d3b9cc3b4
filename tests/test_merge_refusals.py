"""fedrebasin merge: what the user can mend is one line and exit status 2, and nothing is written."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from merge_cases import NET, USER_CODE, Net, load, plant, run, save
from torch import nn

from fedrebasin import trace

FILES = "a.safetensors b.safetensors"


@pytest.fixture(autouse=True)
def planted(folder: Path) -> None:
    plant(folder)


def refused(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(file.name for file in folder.iterdir() if file.name != "__pycache__")
    assert run(line) == 2
    out, said = capsys.readouterr()
    assert out == "" and said.startswith("fedrebasin: ") and said.count("\n") == 1
    assert sorted(file.name for file in folder.iterdir() if file.name != "__pycache__") == before
    return said


OPTIONS = {
    f"{FILES} --output out.safetensors": "--model: expected module:Class, or --spec",
    f"{FILES} {NET}": "--output: expected the path of the merged file",
    f"a.safetensors {NET} --output out.safetensors": "files: expected two safetensors files or more; got 1",
    f"{FILES} --model merged_nets:Net --output out.safetensors": "--input: expected at least one",
    f"{FILES} --model merged_nets:Other --input 2x3x8x8 --output out.safetensors": "has no 'Other'",
    f"{FILES} --model absent_nets:Net --input 2x3x8x8 --output out.safetensors": "cannot import 'absent_nets'",
    f"{FILES} {NET} --output out.safetensors --coefficients 1,2,3": "coefficients: expected 2",
    f"{FILES} {NET} --output out.safetensors --coefficients a,b": "--coefficients: expected numbers",
    f"{FILES} {NET} --output out.safetensors --matching best": "--matching: expected one of weight, activation",
    f"{FILES} {NET} --output out.safetensors --method best": "--method: expected one of merge-many",
    f"{FILES} {NET} --output out.safetensors --method merge-many --reference a.safetensors": "leave --reference out",
    f"{FILES} {NET} --output out.safetensors --method merge-many --matching sinkhorn": "--method: needs --matching",
    f"{FILES} {NET} --output out.safetensors --reference c.safetensors": "--reference: expected one of the files",
    f"{FILES} {NET} --output out.safetensors --matching activation": "activation needs --calibration",
    f"{FILES} {NET} --output out.safetensors --correction best": "--correction: expected none, repair",
    f"{FILES} {NET} --output out.safetensors --correction repair": "repair needs --calibration",
    f"{FILES} {NET} --output out.safetensors --calibration absent.npy": "cannot read absent.npy",
    f"{FILES} {NET} --output out.safetensors --mean .5": "--mean: needs --calibration",
    f"{FILES} {NET} --output out.safetensors --std 1,1,1": "--std: needs --calibration",
    f"{FILES} {NET} --output out.safetensors --memory much": "--memory: expected a size such as 2GB",
    f"{FILES} {NET} --output merged_nets.py/out.safetensors": "--output: expected the path of a file",
    f"{FILES} {NET} --output a --plot a --calibration c.npy": "--plot: expected another path than that of --output",
    f"{FILES} {NET} --output /proc/out.safetensors": "--output: expected the path of a file that can be written",
    f"{FILES} {NET} --dry-run --plot /proc/a.png --calibration c.npy": "--plot: expected the path of a file that can",
    f"{FILES} {NET} --dry-run --plot p.jpg --calibration c.npy": "--plot: expected a path that ends in .png; got p.jpg",
    f"{FILES} --spec absent.json --output out.safetensors": "cannot read absent.json as JSON",
    f"{FILES} --spec s.json --output out.safetensors --correction bias-normalisation": "give --model instead",
    f"{FILES} --spec s.json --output out.safetensors --input 2x3x8x8": "--input: has no meaning with --spec",
    f"{FILES} --spec s.json --output out.safetensors --kwargs {{}}": "--kwargs: has no meaning with --spec",
    f"{FILES} --spec s.json --output out.safetensors --vocab 5": "--vocab: has no meaning with --spec",
    f"{FILES} {NET} --output out.safetensors --examples 50": "--examples: needs --calibration",
    f"{FILES} {NET} --output out.safetensors --vocab 5": "--vocab: needs an --input of integers",
    f'{FILES} {NET} --kwargs {{"width":5}} --output out.safetensors': "a.safetensors: expected 'body.0.weight' as (5,",
}


@pytest.mark.parametrize("line", OPTIONS)
def test_options_that_make_no_sense_are_refused(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert OPTIONS[line] in refused(line.replace('"', '\\"'), folder, capsys)


@pytest.mark.parametrize("options", ["", "--method merge-many", "--correction bias-normalisation"])
def test_calibration_data_that_nothing_uses_is_refused(
    options: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("c.npz", x=np.zeros((5, 3, 8, 8), np.float32), y=[0, 1, 2, 3, 0])
    said = refused(f"{FILES} {NET} --calibration c.npz --output out.safetensors {options}", folder, capsys)
    assert "--calibration: nothing that is asked for uses it; leave it out, or give a --correction" in said


@pytest.mark.parametrize("options", ["--method straight-through-many", "--matching sinkhorn", "--dry-run"])
def test_calibration_data_that_is_used_with_labels_only_is_refused_without(
    options: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("c.npy", np.zeros((5, 3, 8, 8), np.float32))
    said = refused(f"{FILES} {NET} --calibration c.npy --output out.safetensors {options}", folder, capsys)
    assert "--calibration: nothing that is asked for uses it without labels; leave it out" in said


def test_a_spec_that_is_not_proved_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace(Net(), (torch.randn(2, 3, 8, 8),)).save("spec.json")
    line = f"{FILES} --spec spec.json --output out.safetensors"
    assert "spec.json is not proved" in refused(line, folder, capsys)
    assert run(f"{line} --no-check") == 0


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _without_a_tensor(path: Path) -> None:
    save(path, {name: tensor for name, tensor in load(path).items() if name != "head.bias"})


def _edited(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        state = load(path)
        save(path, {**state, name: change(state[name])})

    return edit


def _pickled(path: Path) -> None:
    torch.save(load(path), path)


FILES_GONE_WRONG: dict[str, Callable[[Path], None]] = {
    "it is cut off": _truncated,
    "'head.bias' is in one only": _without_a_tensor,
    "expected 'head.bias' as (4,), as in a.safetensors": _edited("head.bias", lambda tensor: tensor[:3].clone()),
    "expected 'head.bias' as torch.float32, as in a.safetensors; got torch.int64": _edited(
        "head.bias", lambda tensor: tensor.long()
    ),
    "'head.bias' holds a NaN or an infinity": _edited("head.bias", lambda tensor: tensor.fill_(float("nan"))),
    "'hidden.weight' holds a NaN or an infinity": _edited("hidden.weight", lambda tensor: tensor / 0),
    "safetensors.torch.save_file(torch.load(path, weights_only=True)": _pickled,
    "cannot read it (No such file or directory)": Path.unlink,
}


@pytest.mark.parametrize("said", FILES_GONE_WRONG)
def test_files_that_cannot_be_merged_are_named(said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FILES_GONE_WRONG[said](folder / "b.safetensors")
    found = refused(f"{FILES} {NET} --output out.safetensors", folder, capsys)
    assert "b.safetensors: " in found and said in found


@pytest.mark.parametrize("label", [50, -1])
@pytest.mark.parametrize("options", ["--dry-run", "--matching straight-through --output out.safetensors"])
def test_labels_that_are_no_class_of_the_network_are_refused(
    label: int, options: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("c.npz", x=np.zeros((5, 3, 8, 8), np.float32), y=[0, 3, -100, 1, label])
    said = refused(f"{FILES} {NET} --calibration c.npz {options}", folder, capsys)
    assert f"--calibration: expected labels from 0 to 3, one for each output; got {label}; number the" in said


def test_a_prefix_of_the_names_is_told_with_a_line_that_takes_it_off(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        save(
            Path(f"{name}.safetensors"),
            {f"_orig_mod.module.{key}": t for key, t in load(f"{name}.safetensors").items()},
        )
    said = refused(f"{FILES} {NET} --output out.safetensors", folder, capsys)
    assert "a.safetensors: its tensors' names have the prefix '_orig_mod.module.' (torch.compile, DataParallel)" in said
    line = said.partition("take it off: ")[2].replace("'model.safetensors'", "path")
    for name in "ab":
        exec(line, {"safetensors": safetensors, "path": f"{name}.safetensors"})
    assert run(f"{FILES} {NET} --output out.safetensors") == 0


def test_a_prefix_of_the_spec_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = nn.Sequential(OrderedDict(module=Net()))
    trace(wrapped, (torch.randn(2, 3, 8, 8),)).save("spec.json")
    said = refused(f"{FILES} --spec spec.json --no-check --output out.safetensors", folder, capsys)
    assert "names lack the prefix 'module.' (DataParallel) of the model's; give the --model or --spec without" in said


def test_tables_of_integers_that_differ_are_refused_and_counters_are_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "merged_tables.py").write_text(
        USER_CODE + "\n\nclass Table(Net):\n    def __init__(self):\n        super().__init__()\n"
        '        self.register_buffer("table", torch.arange(4))\n\n'
        "    def forward(self, x):\n        return super().forward(x)[:, self.table]\n"
    )
    for name, table in (("a", [0, 1, 2, 3]), ("b", [0, 1, 3, 2])):
        save(folder / f"{name}.safetensors", {**load(f"{name}.safetensors"), "table": torch.tensor(table)})
    line = f"{FILES} --model merged_tables:Table --input 2x3x8x8 --output out.safetensors"
    assert "expected the integers of 'table' as in a.safetensors" in refused(line, folder, capsys)
    sys.modules.pop("merged_tables", None)
