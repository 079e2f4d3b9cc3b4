"""Both ends in one run, the model of all data in another: their results join, and nothing else does."""

from __future__ import annotations

import dataclasses

import pytest

from fedrebasin.errors import UsageError
from fedrebasin.simulations import ends
from fedrebasin.simulations.cli import run
from fedrebasin.simulations.disjoint import redraw, reproduce_disjoint
from fedrebasin.simulations.disjoint_join import join_results
from fedrebasin.simulations.disjoint_options import DisjointOptions
from fedrebasin.simulations.readme import render
from fedrebasin.simulations.results import load_results, save_results

TINY = DisjointOptions("digits", width=8, epochs=1, lams=3, calibration_images=50, device="cpu", corrections=())


def silent(line):
    del line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of a whole run, of both ends alone and of the model of all data alone."""
    folder = tmp_path_factory.mktemp("ends")
    kinds = {"whole": ends.END_NAMES, "pair": ("a", "b"), "all": ("all",)}
    for name, trained in kinds.items():
        reproduce_disjoint(dataclasses.replace(TINY, ends=trained, output=folder / name), silent)
    return folder


def results_of(folder, name):
    return load_results(folder / name / "results.json")


def test_both_ends_alone_give_every_number_but_that_of_the_third_model(runs):
    whole, pair = (results_of(runs, name)["seeds"][0] for name in ("whole", "pair"))
    assert set(whole["rows"]) - set(pair["rows"]) == {"all"}
    assert pair["rows"] == {name: whole["rows"][name] for name in pair["rows"]}
    assert pair["curves"] == whole["curves"]
    assert (runs / "pair" / "report.html").exists() and not list((runs / "pair" / "ends").glob("all-*"))


def test_the_model_of_all_data_alone_is_that_of_the_whole_run(runs):
    seed = results_of(runs, "all")["seeds"][0]
    assert seed["rows"] == {"all": results_of(runs, "whole")["seeds"][0]["rows"]["all"]}
    assert {path.name for path in (runs / "all").iterdir()} == {"results.json", "ends", "partial"}


def test_joined_results_are_those_of_a_whole_run(runs, tmp_path):
    files = [runs / name / "results.json" for name in ("pair", "all")]
    page = redraw(files[0], tmp_path, silent, files[1:])
    joined, whole = load_results(tmp_path / "results.json"), results_of(runs, "whole")
    for part in ("rows", "reliability", "curves"):
        assert joined["seeds"][0][part] == whole["seeds"][0][part]
    assert len(joined["joined"]) == 1 and page == tmp_path / "report.html"
    assert load_results(files[0]) == results_of(runs, "pair"), "the first file stays as it was"


@pytest.mark.parametrize(("key", "value"), [("epochs", 7), ("width", 9), ("model", "conv"), ("precision", "bfloat16")])
def test_results_of_another_training_are_refused(runs, key, value):
    pair, other = (results_of(runs, name) for name in ("pair", "all"))
    other["config"][key] = value
    with pytest.raises(UsageError, match=f"--redraw: expected results with {key} .* got {value}"):
        join_results([pair, other])


def test_results_of_before_the_choice_of_a_precision_join_those_without_one(runs):
    pair, other = (results_of(runs, name) for name in ("pair", "all"))
    del pair["config"]["precision"]
    assert "all" in join_results([pair, other])["seeds"][0]["rows"]


def test_a_precision_is_part_of_the_results_and_of_their_ends_names(tmp_path):
    reproduce_disjoint(dataclasses.replace(TINY, precision="bfloat16", output=tmp_path), silent)
    results = load_results(tmp_path / "results.json")
    assert results["config"]["precision"] == "bfloat16"
    assert {path.stem.split("-")[-2] for path in (tmp_path / "ends").iterdir()} == {"bfloat16"}
    assert "batch 64) in bfloat16;" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="has precision bfloat16, this run auto"):
        reproduce_disjoint(dataclasses.replace(TINY, output=tmp_path), silent)


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--precision: expected one of auto, float32, bfloat16; got 'half'"):
        reproduce_disjoint(dataclasses.replace(TINY, precision="half", output=tmp_path), silent)


def test_a_seed_that_is_missing_is_named(runs):
    pair, other = (results_of(runs, name) for name in ("pair", "all"))
    other["seeds"][0]["seed"] = 4
    with pytest.raises(UsageError, match=r"--redraw: expected seed 0 in every file; got \[4\]"):
        join_results([pair, other])


def test_the_readme_has_a_dash_where_the_third_model_is_missing(runs, tmp_path):
    for name in ("pair", "whole"):
        save_results(tmp_path / name / "results.json", results_of(runs, name))
    table = render("<!-- table: disjoint pair whole -->\n<!-- end -->", tmp_path)
    row = next(line for line in table.splitlines() if "trained on all data" in line)
    assert row.split(" | ")[1] == "-" and "/" in row.split(" | ")[2]


def test_the_command_trains_the_named_ends_and_draws_again(tmp_path, capsys):
    options = "--width 4 --epochs 1 --lams 3 --calibration 20 --corrections none --device cpu"
    for words in ("--ends a,b", "--ends all"):
        folder = tmp_path / words[-1]
        assert run(f"reproduce disjoint digits {options} {words} --output {folder}".split()) == 0
    assert f"the results are {tmp_path}/l/results.json" in capsys.readouterr().out.replace("\n", "")
    files = f"--redraw {tmp_path}/b/results.json --redraw {tmp_path}/l/results.json"
    assert run(f"reproduce disjoint digits {files} --output {tmp_path}/joined".split()) == 0
    assert "all" in load_results(tmp_path / "joined" / "results.json")["seeds"][0]["rows"]
    assert str(tmp_path / "joined" / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert run(f"reproduce disjoint digits --redraw {tmp_path}/nothing.json".split()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": ("a",)}, "--ends: expected one of a,b,all; a,b; all; got 'a'"),
        ({"augment": "cut"}, "--augment: expected one of shift, zoom, flip; got 'cut'"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        reproduce_disjoint(dataclasses.replace(TINY, output=tmp_path / "out", **changes), silent)
    assert not (tmp_path / "out").exists()


def test_corrections_can_be_chosen_and_those_without_a_meaning_are_refused(tmp_path):
    options = dataclasses.replace(TINY, output=tmp_path, corrections=("rescale",))
    reproduce_disjoint(options, silent)
    rows = load_results(tmp_path / "results.json")["seeds"][0]["rows"]
    assert "aligned+rescale" in rows and "aligned+repair" not in rows
    for wrong in ("reset", "magic"):
        with pytest.raises(UsageError, match=f"--corrections: expected some of .* got '{wrong}'"):
            reproduce_disjoint(dataclasses.replace(options, corrections=(wrong,)), silent)
