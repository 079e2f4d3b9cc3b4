"""fedrebasin inspect: the table, the page, the saved spec, and the zoo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import nn

from fedrebasin import PermutationSpec, trace
from fedrebasin.errors import UsageError
from fedrebasin.layout import Fixed
from fedrebasin.simulations import cli, inspection, inspection_zoo
from fedrebasin.simulations.inspection_inputs import build, example_inputs, load_factory, parse_input, parse_inputs
from fedrebasin.simulations.inspection_picture import layers, lines
from fedrebasin.simulations.results import load_results

ROOT = Path(__file__).resolve().parent.parent

USER_CODE = '''
import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


class Tokens(nn.Module):
    """An embedding, a mask by keyword, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.table, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, tokens, mask=None):
        found = self.table(tokens) + self.place
        found = found if mask is None else found * mask.unsqueeze(-1)
        return {"logits": self.out(torch.relu(self.hidden(found)))}


class Fourier(Mlp):
    """An op that no rule covers."""

    def forward(self, x):
        return self.last(self.norm(torch.fft.fft(self.first(x)).real))


class Branching(Mlp):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Plain(Mlp):
    """A tensor that is no buffer keeps the model off the meta device."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(4, device="cpu")

    def forward(self, x):
        return super().forward(x * self.scale)


def pretrained(weights="DEFAULT", pretrained=True):
    assert weights is None and pretrained is False, "a download"
    return Mlp()


def broken():
    raise RuntimeError("no such width")


def text():
    return "a text"


built, number = Mlp(), 3
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "inspected_nets.py").write_text(USER_CODE)
    (folder / "inspected_broken.py").write_text("import inspected_lost")
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def run(line: str) -> int:
    return cli.run(["inspect", *line.split()])


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
    "inspected_nets:number --input 3x4": "to be a function or class; got a int",
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
    "inspected_nets:Branching --input 3x4": "no branch depends on the data",
    "inspected_nets:Fourier --input 3x4 --strict": "no rule covers it",
    "inspected_nets:Fourier --input 3x4 --strict --no-check": "no rule covers it",
    "inspected_nets:Mlp --input 3x4 --save .": "--save: expected the path of a file",
    "inspected_nets:Mlp --input 3x4 --html inspected_nets.py/page.html": "--html: expected the path of a file",
    "inspected_nets:Mlp --input 3x4 --vocab 0": "'--vocab': 0 is not in the range",
    "inspected_nets:Mlp --input 3x4 --only resnet18": "--only: needs --zoo",
    "inspected_nets:Mlp --zoo": "model: has no meaning with --zoo",
    "--zoo --no-check": "--no-check: has no meaning with --zoo",
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


def test_an_op_without_a_rule_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspected_nets:Fourier --input 3x4") == 0
    said = capsys.readouterr().out
    assert re.search(r"note +no rule for (aten\.)?fft_fft", said)
    assert "fft" in said.partition("What stays fixed")[2]


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


def test_without_a_check_the_meta_device_gives_the_same_spec_unproved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for net, where in (("Tokens --input 2x5:int64", "no weights held"), ("Plain --input 3x4", "")):
        assert run(f"inspected_nets:{net} --save {tmp_path}/proved.json") == 0
        capsys.readouterr()
        assert run(f"inspected_nets:{net} --no-check --save {tmp_path}/spec.json") == 0
        said = capsys.readouterr().out
        assert re.search(r"proof +skipped", said)
        assert ("no weights held" in said) == bool(where)
        proved, unproved = (PermutationSpec.load(tmp_path / f"{name}.json") for name in ("proved", "spec"))
        assert proved.checked and not unproved.checked
        assert proved.axes == unproved.axes


class Page(HTMLParser):
    """Text and links of a page whose tags must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_names_every_perm_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    line = f"inspected_nets:Tokens --input 2x5:int64 --html {path} --save {tmp_path}/spec.json"
    assert run(line) == 0
    spec = PermutationSpec.load(tmp_path / "spec.json")
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text.replace("<wbr>", ""))  # where a name may break
    assert page.open == [] and "script" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"https?://|url\(|@import", text)
    assert set(spec.perm_shapes) <= set(page.texts) and len(spec.perm_shapes) > 1
    for perm in spec.perm_shapes:  # in the picture too
        assert any(title.startswith(f"{perm}: ") for title in page.texts)
    for reason in ("table", "output"):
        assert reason in page.texts
    assert text.count('<g class="line c') == len(spec.perm_shapes)
    assert "passed on random weights" in text and "2x5:int64" in text


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    strange = nn.ModuleDict({"a<b>&": nn.Linear(4, 3), "c": nn.Linear(3, 2)})
    strange.forward = lambda x: strange["c"](strange["a<b>&"](x))  # type: ignore[assignment]
    sys.modules["inspected_strange"] = strange_module = type(sys)("inspected_strange")
    strange_module.net = strange  # type: ignore[attr-defined]
    assert run(f"inspected_strange:net --input 3x4 --html {tmp_path}/page.html") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a&lt;b&gt;&amp;" in text and "a<b>&" not in text


def test_lines_that_meet_in_a_row_never_share_a_lane() -> None:
    net = networks.DenseBlock()
    spec = trace(net, networks.IMAGE)
    rows = layers(spec)
    drawn = lines(spec, rows)
    assert {line.perm for line in drawn} == set(spec.perm_shapes)
    for line in drawn:
        touched = {rows[row].name for row in line.dots}
        assert touched == {axis.name.rpartition(".")[0] for axis in spec.tied[line.perm]}
        others = [other for other in drawn if other is not line and other.lane == line.lane]
        assert all(other.last < line.first or line.last < other.first for other in others)


def test_a_long_chain_needs_few_lanes() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(120)))
    spec = trace(net, (torch.zeros(2, 3),))
    drawn = lines(spec, layers(spec))
    assert len(drawn) == 119 and {line.lane for line in drawn} == {0, 1}
    assert [line.dots for line in drawn[:2]] == [{0: "first", 1: "later"}, {1: "first", 2: "later"}]


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


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over two small models."""
    folder = tmp_path_factory.mktemp("zoo")
    assert run(f"--zoo --only shufflenet_v2_x0_5,squeezenet1_1 --output {folder}") == 0
    return folder


def test_the_zoo_holds_a_row_for_each_model(zoo: Path) -> None:
    results = load_results(zoo / "results.json")
    assert [row["model"] for row in results["rows"]] == ["squeezenet1_1", "shufflenet_v2_x0_5"]
    for row, parameters in zip(results["rows"], (1235496, 1366792), strict=True):
        assert row["parameters"] == parameters and row["free-share"] > 0.99
        assert row["perms"] > 20 and row["log10-order"] > 4000
        assert row["change"] < 1e-9 and row["proof"] == "passed" and row["error"] is None
        assert row["export-seconds"] > row["trace-seconds"] > 0
        assert {"input", "output"} <= set(row["fixed"]) and row["notes"] == []
    assert {"python", "torch", "torchvision"} <= set(results["provenance"]["versions"])
    assert results["provenance"]["seeds"] == [0] and results["provenance"]["seconds"] > 0
    assert list(zoo.iterdir()) == [zoo / "results.json"]


def test_a_second_run_goes_on_where_the_first_ended(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_bytes((zoo / "results.json").read_bytes())
    code = load_results(zoo / "results.json")["rows"][0]["code"]
    monkeypatch.setattr(inspection_zoo, "_code", lambda: code)
    measured = []

    def fake(name: str, seed: int) -> dict[str, Any]:
        measured.append(name)
        rows = load_results(tmp_path / "results.json")["rows"]
        if name == "mnasnet0_5":  # whatever was finished is in the file by now
            assert [row["model"] for row in rows][:2] == ["squeezenet1_1", "shufflenet_v2_x0_5"]
            return {**dict.fromkeys(rows[0]), "model": name, "seconds": 1.0, "error": "exit status -9: no memory"}
        return {**rows[0], "model": name}

    monkeypatch.setattr(inspection_zoo, "_in_a_process", fake)
    line = f"--zoo --only squeezenet1_1,mnasnet0_5,shufflenet_v2_x0_5,mnasnet0_75 --output {tmp_path}"
    assert run(line) == 1  # a model that fails is a row, not an end
    assert measured == ["mnasnet0_5", "mnasnet0_75"]
    said = capsys.readouterr()
    assert "squeezenet1_1: measured earlier, used again" in said.err
    assert "mnasnet0_5: exit status -9: no memory" in said.out
    assert "4 models, 3 traced, 3 proved" in said.out
    measured.clear()
    assert run(line) == 1
    assert measured == ["mnasnet0_5"]  # what failed is tried again
    assert run(f"--zoo --only squeezenet1_1 --output {tmp_path}") == 1
    assert measured == ["mnasnet0_5"]  # and what was not asked for stays as it is
    assert len(load_results(tmp_path / "results.json")["rows"]) == 4


def test_rows_of_other_code_are_measured_again_and_never_lost(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    old = load_results(zoo / "results.json")
    for row in old["rows"]:
        row["code"] = "older"
    path.write_text(json.dumps(old))
    before = path.read_bytes()
    assert run(f"--zoo --only squeezenet1_1 --output {tmp_path}") == 2
    assert "holds rows of other code" in capsys.readouterr().err
    assert path.read_bytes() == before
    measured = []
    monkeypatch.setattr(
        inspection_zoo, "_in_a_process", lambda name, seed: measured.append(name) or {**old["rows"][0], "model": name}
    )
    assert run(f"--zoo --only squeezenet1_1,shufflenet_v2_x0_5 --output {tmp_path}") == 0
    assert measured == ["squeezenet1_1", "shufflenet_v2_x0_5"]


def test_a_process_that_dies_is_a_row_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_zoo.sys, "executable", "/bin/false")
    row = inspection_zoo._in_a_process("resnet18", 0)
    assert row["error"] == "exit status 1: nothing on stderr"
    assert row["model"] == "resnet18" and row["perms"] is None


def test_a_model_on_the_meta_device_says_that_it_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_zoo, "ON_META", ("squeezenet1_1",))
    row = inspection_zoo.measure("squeezenet1_1", 0)
    assert row["device"] == "meta" and row["input"] == "1x3x64x64"
    assert row["proof"] == "skipped: no weights are held" and "change" not in row
    assert row["log10-order"] > 5000


def test_a_failed_proof_keeps_the_numbers_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **words: Any) -> None:
        raise UsageError("no proof today")

    monkeypatch.setattr(inspection_zoo, "proved", fail)
    row = inspection_zoo.measure("squeezenet1_1", 0)
    assert row["error"] == "UsageError: no proof today" and row["perms"] == 25


def test_the_zoo_is_every_classifier_up_to_60_million_parameters_and_four_more() -> None:
    names = inspection_zoo.zoo_models()
    assert len(names) == len(set(names)) == 55
    assert names[0] == "squeezenet1_1" and names[-4:] == ["vit_b_16", "vit_b_32", "vgg11", "vit_h_14"]
    assert {"regnet_x_16gf", "swin_v2_s", "maxvit_t", "inception_v3"} <= set(names)
