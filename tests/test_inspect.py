"""fedrebasin inspect: what it understands, what it shows, and the saved spec."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inspected import run
from torch import nn

from fedrebasin import PermutationSpec, trace
from fedrebasin.layout import Fixed
from fedrebasin.simulations import inspection
from fedrebasin.simulations.inspection_factory import build, load_factory
from fedrebasin.simulations.inspection_inputs import example_inputs, parse_input, parse_inputs

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("at_home")


def test_the_terminal_shows_perms_what_is_fixed_and_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.path)
    assert run("inspected_nets:Mlp --input 3x4") == 0
    said, progress = capsys.readouterr()
    assert progress == "" and sys.path == before
    assert re.search(r"│ first +│ 6 +│ first\.\*:0, norm\.\*:0, last\.weight:1", said)
    assert re.search(r"│ input +│ 1 +│ first\.weight:1", said)
    assert re.search(r"│ output +│ 2 +│ last\.weight:0, last\.bias:0", said)
    assert "56; 96.43% in tensors that some permutation moves" in said
    assert "1; 10^2.9 orders" in said
    assert re.search(r"proof +passed on random weights; the largest relative change of an output is \de-1\d", said)


@pytest.mark.parametrize(
    "line",
    [
        "inspected_nets:Tokens --input int64:2x5",
        "inspected_nets:Tokens --input 2x5:int64 --input mask=2x5 --vocab 11 --seed 3",
        "inspected_nets:Tokens --input tokens=2x5:int32 --strict",
        "inspected_nets:pretrained --input 3x4",
        "inspected_nets:built --input 3x4 --no-check",
        'torch.nn:Linear --input 3x4 --kwargs {"in_features":4,"out_features":2}',
    ],
)
def test_factories_and_inputs_of_many_kinds_are_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    assert "proof" in capsys.readouterr().out


def test_arguments_reach_the_factory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run('inspected_nets:Mlp --input 3x4 --kwargs {"width":9}') == 0
    assert re.search(r"│ first +│ 9 +│", capsys.readouterr().out)


BAD = {
    "": "--input: expected at least one",
    "inspected_nets:Mlp": "--input: expected at least one",
    "--input 3x4": "model: expected module:factory",
    "inspected_nets --input 3x4": "model: expected module:factory",
    "inspected_absent:Mlp --input 3x4": "cannot import 'inspected_absent'",
    "inspected_broken:Mlp --input 3x4": "No module named 'inspected_lost'",
    "inspected_nets:Absent --input 3x4": "'inspected_nets' has no 'Absent'",
    "inspected_nets:number --input 3x4": "to be a function or class; got one of type int",
    "inspected_nets:broken --input 3x4": "broken() raised RuntimeError: no such width",
    "inspected_nets:text --input 3x4": "expected text() to return a torch.nn.Module; got a str",
    "inspected_nets:Mlp --input 3x4 --kwargs {": "--kwargs: expected a JSON object",
    "inspected_nets:Mlp --input 3x4 --kwargs [1]": "--kwargs: expected a JSON object",
    'inspected_nets:Mlp --input 3x4 --kwargs {"depth":2}': "unexpected keyword argument 'depth'",
    "inspected_nets:Mlp --input 3by4": "--input: expected a shape such as 1x3x32x32",
    "inspected_nets:Mlp --input 3x0": "--input: expected sizes of 1 or more",
    "inspected_nets:Mlp --input 3x4:int65": "--input: expected a dtype among",
    "inspected_nets:Mlp --input int64:3x4:int64": "--input: expected a shape",
    "inspected_nets:Mlp --input x=3x4 --input x=3x4": "--input: expected every keyword once",
    "inspected_nets:Mlp --input x=3x4 --input 3x4": "--input: expected inputs without a keyword first",
    "inspected_nets:Mlp --input 3x4 --input x=3x4": "a keyword names an input that is also given without one",
    "inspected_nets:Mlp --input 3x5": "torch.export cannot export Mlp",
    "inspected_nets:Branching --input 3x4": "hand over a spec written for this model",
    "inspected_nets:Filled --input 3x4 --strict": "no rule covers it",
    "inspected_nets:Filled --input 3x4 --strict --no-check": "no rule covers it",
    "inspected_nets:Mlp --input 3x4 --save .": "--save: expected the path of a file",
    "inspected_nets:Mlp --input 3x4 --html inspected_nets.py/page.html": "--html: expected the path of a file",
    "inspected_nets:Mlp --input 3x4 --save inspected_nets.py": "--save: inspected_nets.py is there already; give",
    "inspected_nets:Mlp --input 3x4 --html inspected_nets.py": "--html: inspected_nets.py is there already; give",
    "inspected_nets:Mlp --input 3x4 --html /proc/a.html": "--html: expected the path of a file that can be written",
    "inspected_nets:Mlp --input 3x4 --save /proc/a/b.json": "--save: expected the path of a file that can be written",
    "inspected_nets:Mlp --input 3x4 --html a --save a": "--html: expected another path than that of --save; got a",
    "inspected_nets:Mlp --input 3x4 --vocab 0": "'--vocab': 0 is not in the range",
    "inspected_nets:Mlp --input 3x4 --only resnet18": "--only: needs --zoo",
    "inspected_nets:Mlp --zoo": "model: has no meaning with --zoo",
    "--zoo --no-check": "--no-check: has no meaning with --zoo",
    "--zoo --force": "--force: has no meaning with --zoo",
    "--zoo --only resnet18,resnet19": "got 'resnet19'",
    "--zoo --only resnet18 --output inspected_nets.py": "--output: expected a folder",
}


@pytest.mark.parametrize("line", BAD)
def test_a_mistake_is_one_line_and_status_2_and_writes_nothing(
    line: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in home.rglob("*") if "__pycache__" not in path.parts}
    files = "" if "--zoo" in line or "--html" in line or "--save" in line else " --html page.html --save spec.json"
    assert run(line + files) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert BAD[line] in said.err
    assert said.err.startswith("fedrebasin: ") and said.err.count("\n") == 1
    assert {path for path in home.rglob("*") if "__pycache__" not in path.parts} == before


def test_complex_inputs_and_graphs_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("networks_spectral:Complex --input 3x4:complex64") == 0
    assert "passed on random weights" in capsys.readouterr().out
    assert run("test_sizes:Graph --input 5x4 --input 2x6:int64 --input 5:int64 --vocab 5") == 0
    assert "passed on random weights" in capsys.readouterr().out


def test_an_op_without_a_rule_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected_nets:Filled --input 3x4") == 0
    said = capsys.readouterr().out
    assert re.search(r"note +no rule for (aten\.)?masked_scatter", said)
    assert "masked_scatter" in said.partition("What stays fixed")[2]


def test_a_spec_that_changes_the_function_is_refused_and_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = inspection.spec_of

    def wrong(exported: Any, *, strict: bool) -> PermutationSpec:
        spec = right(exported, strict=strict)
        return replace(spec, axes={**spec.axes, "first.bias": (Fixed(6),)})

    monkeypatch.setattr(inspection, "spec_of", wrong)
    assert run(f"inspected_nets:Mlp --input 3x4 --save {tmp_path}/spec.json") == 2
    assert "permuting 'first' alone changes an output" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--save", "--json"])
def test_the_saved_spec_is_the_traced_one_with_the_mark_of_its_check(option: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "spec.json"
    assert run(f"inspected_nets:Mlp --input 3x4 {option} {path}") == 0
    saved = PermutationSpec.load(path)
    model = build(load_factory("inspected_nets:Mlp"), {})
    assert saved == replace(trace(model, (torch.zeros(3, 4),)), checked=True)
    assert saved.checked and list(path.parent.iterdir()) == [path]
    path.write_text("before")
    assert run(f"inspected_nets:Mlp --input 3x4 {option} {path} --force") == 0
    assert PermutationSpec.load(path) == saved


def test_without_a_check_the_meta_device_gives_the_same_spec_unproved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for net, where in (("Tokens --input 2x5:int64", "no weights held"), ("Plain --input 3x4", "")):
        assert run(f"inspected_nets:{net} --force --save {tmp_path}/proved.json") == 0
        capsys.readouterr()
        assert run(f"inspected_nets:{net} --no-check --force --save {tmp_path}/spec.json") == 0
        said = capsys.readouterr().out
        assert re.search(r"proof +skipped", said)
        assert ("no weights held" in said) == bool(where)
        proved, unproved = (PermutationSpec.load(tmp_path / f"{name}.json") for name in ("proved", "spec"))
        assert proved.checked and not unproved.checked
        assert proved.axes == unproved.axes


def test_integers_stay_below_the_smallest_table_and_floats_follow_the_seed() -> None:
    model = nn.ModuleList([nn.Embedding(3, 2), nn.Embedding(7, 2)])
    (tokens,) = example_inputs(model, parse_inputs(["50x4:int64"]))
    assert set(tokens.unique().tolist()) == {0, 1, 2}
    (wider,) = example_inputs(model, parse_inputs(["50x4:int64"]), vocab=7)
    assert int(wider.max()) == 6
    one, again, other = (example_inputs(model, [parse_input("5:float64")], seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.dtype is torch.float64
    assert bool(example_inputs(model, [parse_input("bool:4")])[0].all())


def test_inspect_needs_nothing_but_the_plain_installation(home: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('jinja2', 'matplotlib', 'torchvision', 'sklearn', 'pyarrow', 'ray', 'flwr_datasets'):\n"
        "    sys.modules[name] = None\n"
        "from fedrebasin.simulations import cli\n"
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, "inspect", "inspected_nets:Mlp", "--input", "3x4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*call, "--html", f"{tmp_path}/page.html"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").endswith("</html>\n")
    done = subprocess.run(
        [*call[:3], "inspect", "--zoo"], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == 'fedrebasin: missing: torchvision; pip install "fedrebasin[simulation]"\n'
