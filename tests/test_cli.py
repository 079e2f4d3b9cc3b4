"""The command: what the user can mend is one line on stderr and exit status 2, and nothing is written."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fedrebasin.simulations import cli

BAD = {
    "compare nope": "data set: expected one of digits, mnist, cifar10, cifar100; got 'nope'",
    "compare --nodes 1": "'--nodes': 1 is not in the range",
    "compare --nodes 2000": "gets no row; use fewer --nodes",
    "compare --rounds 0": "'--rounds': 0 is not in the range",
    "compare --rounds many": "'many' is not a valid integer",
    "compare --width 0": "'--width': 0 is not in the range",
    "compare --strategies best": "got 'best'",
    "compare --strategies fedavg,fedavg": "each name once",
    "compare --strategies rebasin:best": "got 'rebasin:best'",
    "compare --strategies fedavg+repair": "got 'fedavg+repair'",
    "compare --strategies fedrebasin+magic": "got 'fedrebasin+magic'",
    "compare --partition halves": "--partition: expected one of biased:HELD, dirichlet:ALPHA, iid",
    "compare --start late": "--start: expected apart, common or joins:ROUND; got 'late'",
    "compare --start joins": "--start: joins takes a round from 2 up, as in joins:3; got 'joins'",
    "compare --start joins:1": "--start: joins takes a round from 2 up, as in joins:3; got 'joins:1'",
    "compare --start joins:two": "--start: joins takes a round from 2 up, as in joins:3; got 'joins:two'",
    "compare --start joins:4": "--start: expected a round up to the last, 3; got 'joins:4'",
    "compare --start joins:2": "--nodes: expected at least 3 where one of them joins later; got 2",
    "compare --absent 1": "--absent: expected a probability, 0 <= P < 1; got 1.0",
    "compare --absent nan": "--absent: expected a probability, 0 <= P < 1; got nan",
    "compare --absent often": "'often' is not a valid float",
    "compare --model vit": "--model: expected one of mlp, conv, vgg, resnet20; got 'vit'",
    "compare --norm group": "--norm: expected batch or layer; got 'group'",
    "compare --seeds 1,x": "--seeds: expected whole numbers",
    "compare --seeds -1": "--seeds: expected different numbers from 0 up",
    "compare --seeds 18446744073709551616": "--seeds: expected different numbers from 0 up to 9007199254740992; got",
    "reproduce disjoint digits --seeds 0,18446744073709551616": "--seeds: expected different numbers from 0 up to",
    "reproduce sweep digits --over width:4 --seeds 18446744073709551616": "--seeds: expected different numbers from 0",
    "merge a b --seed 18446744073709551616": "'--seed': 18446744073709551616 is not in the range",
    "compare --reference best": "--reference: expected one of auto, global, largest, merge-many, medoid, cycle-consist",
    "compare --matching learned": "--matching: expected one of weight, activation, activation+weight, straight-through",
    "compare --matching activation --reference merge-many": "reference='merge-many' is built for matching='weight'",
    "reproduce disjoint digits --matching magic": "got 'magic'",
    "compare --correction magic": "--correction: expected one of none, repair, reset-batchnorm, rescale, reshift, "
    "closed-form, bias-normalisation, least-squares, least-squares-probabilities, regmean, distill, "
    "least-squares+distill, patient-distill, best-end, best-end-probabilities, federated-repair, "
    "federated-least-squares, federated-regmean, federated-repair-at-once, federated-least-squares-prior; got 'magic'",
    "compare --server-lr 0": "--server-lr: expected a positive number",
    "compare --device tpu0": "--device: expected auto, cpu or cuda; got 'tpu0'",
    "compare --device meta": "--device: expected auto, cpu or cuda; torch cannot use 'meta' here",
    "reproduce disjoint digits --device meta": "--device: expected auto, cpu or cuda; torch cannot use 'meta' here",
    "reproduce sweep digits --over width:4 --device meta": "torch cannot use 'meta' here",
    "compare --data somewhere": "--data: digits come with scikit-learn",
    "compare mnist --data no/such/folder": "there is no folder no/such/folder",
    "compare --output taken": "--output: expected a new or empty folder",
    "compare --output file/below": "--output: cannot make",
    "compare --colour red": "No such option '--colour'",
    "compare digits mnist": "unexpected extra argument",
    "reproduce": "",
    "reproduce disjoint": "Missing argument",
    "reproduce disjoint nope": "nope",
    "merge": "Missing argument 'FILES...'",
    "fuse": "No such command 'fuse'",
}


@pytest.mark.parametrize("line", BAD)
def test_a_mistake_is_one_line_and_status_2_and_writes_nothing(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.json").write_text("{}")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(line.split()) == 2
    said = capsys.readouterr()
    if BAD[line]:  # a command without its subcommand shows the help instead
        assert said.out == ""
        assert BAD[line] in said.err
        assert said.err.count("\n") == 1
        assert said.err.startswith("fedrebasin: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_the_data_set_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-0.parquet").write_text("not parquet")
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path), str(tmp_path / "..")):
        assert cli.run(["compare", "mnist", "--data", folder, "--output", "new"]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("fedrebasin: --data: ")
    assert not (tmp_path / "new").exists()


def test_a_missing_package_names_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedrebasin.simulations.compare.find_spec", lambda name: None if name == "ray" else object())
    assert cli.run(["compare"]) == 2
    assert capsys.readouterr().err == 'fedrebasin: missing: flwr[simulation]; pip install "fedrebasin[simulation]"\n'


def test_the_help_needs_neither_flower_nor_matplotlib() -> None:
    code = (
        "import sys; from fedrebasin.simulations import cli; status = cli.run(['--help']); "
        "print(status, sorted({'flwr', 'ray', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"fedrebasin {version('fedrebasin')}\n"


@pytest.mark.parametrize("command", ["compare", "reproduce disjoint", "reproduce sweep"])
def test_the_help_names_the_data_sets(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    assert "Data sets: digits, mnist, cifar10, cifar100." in capsys.readouterr().out


def test_a_suggestion_is_made_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["reproduce", "disjont"]) == 2
    assert capsys.readouterr().err.count("Did you mean") <= 1


def test_the_exit_status_reaches_the_shell() -> None:
    call = [sys.executable, "-m", "fedrebasin.simulations.cli", "compare", "--start", "late"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "fedrebasin: --start: expected apart, common or joins:ROUND; got 'late'\n"
