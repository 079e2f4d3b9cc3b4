"""The command in Flower's real simulation runtime: a whole comparison, and one that is interrupted in mid-round."""

from __future__ import annotations

import html
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from fedrebasin.simulations.results import load_results

COMMAND = [sys.executable, "-m", "fedrebasin.simulations.cli", "compare", "digits"]
PROC = Path("/proc")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, set[int]]:
    """Results of two nodes that start apart, their folder, and what was still running when the command ended."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    mark = f"FEDREBASIN_TEST={uuid.uuid4()}"
    call = [*COMMAND, "--rounds", "2", "--later-epochs", "1", "--output", str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment(mark, folder.parent))
    assert done.returncode == 0, done.stderr
    assert str(folder / "report.html") in done.stdout
    return load_results(folder / "results.json"), folder, running(mark)


def test_every_round_of_a_start_apart_has_all_replies_and_no_failure(
    compared: tuple[dict[str, Any], Path, set[int]],
) -> None:
    results, folder, left = compared
    assert [run["strategy"] for run in results["runs"]] == ["fedavg", "fedrebasin", "fedavg@common"]
    for run in results["runs"]:
        assert [row["round"] for row in run["rounds"]] == [0, 1, 2]
        for row in run["rounds"][1:]:
            assert (row["expected"], row["replies"], row["failures"]) == (2, 2, [])
            assert [node["node"] for node in row["nodes"]] == [0, 1]
            assert [node["examples"] for node in row["nodes"]] == [673, 674]
    pictures = ["accuracy-by-bytes.png", "accuracy.png", "loss.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*pictures, "report.html", "results.json"]
    assert list(folder.parent.glob("fedrebasin-*")) == []
    assert left == set()


def test_fedrebasin_is_twenty_points_above_fedavg_after_clients_trained_apart(
    compared: tuple[dict[str, Any], Path, set[int]],
) -> None:
    results, _, _ = compared
    plain, aligned, common = (run["rounds"][1]["accuracy"] for run in results["runs"])
    assert aligned > plain + 0.2
    assert aligned > 0.85
    assert common > 0.9
    entry = results["baselines"][0]
    assert min(client["accuracy"] for client in entry["clients"]) > 0.85
    assert entry["ensemble"]["accuracy"] > plain


def test_every_strategy_merges_the_same_clients(compared: tuple[dict[str, Any], Path, set[int]]) -> None:
    results, _, _ = compared
    first, second, common = (run["rounds"][1]["nodes"] for run in results["runs"])
    assert [node["train-loss"] for node in first] == [node["train-loss"] for node in second]
    assert [node["train-loss"] for node in first] != [node["train-loss"] for node in common]
    assert [node["reused"] for node in first + second + common] == [False, False, True, True, False, False]


@pytest.mark.slow
def test_nodes_measure_and_keep_the_best_model_on_rows_that_nothing_was_trained_on(tmp_path: Path) -> None:
    corrections = ["federated-repair", "federated-regmean"]
    call = [*COMMAND, "--rounds", "2", "--later-epochs", "1", "--strategies", "fedrebasin", "--select", "clients"]
    call += ["--correction", ",".join(corrections), "--output", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment("SELECT=1", tmp_path))
    assert done.returncode == 0, done.stderr
    results = load_results(tmp_path / "out" / "results.json")
    names = [f"{path}{end}" for path in ("plain", "aligned") for end in ("", *(f"+{one}" for one in corrections))]
    for run in results["runs"]:
        for row in run["rounds"][1:]:
            assert [node["examples"] for node in row["nodes"]] == [539, 540]
    for row in results["runs"][0]["rounds"][1:]:
        assert (row["rebasin-voters"], row["rebasin-query-left-out"]) == (2, 0)
        losses = {name: row.get(f"rebasin-loss-{name}", float("inf")) for name in names}
        assert names[int(row["rebasin-selected"])] == min(losses, key=losses.__getitem__)
    assert len(losses) == len(names)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Model kept" in page
    assert "lowest loss on a fifth of each node's rows" in html.unescape(page)


@pytest.mark.skipif(not (PROC / "self" / "stat").exists(), reason="looks for processes in Linux's process table")
def test_an_interrupt_in_mid_round_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    mark = f"FEDREBASIN_TEST={uuid.uuid4()}"
    call = [*COMMAND, "--strategies", "fedavg", "--epochs", "100000", "--output", str(tmp_path / "new" / "out")]
    command = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment(mark, tmp_path))
    try:
        read_until(command, "epoch")
        seen = running(mark) | descendants(command.pid)
        names = {name_of(pid) for pid in seen}
        assert {"raylet", "gcs_server", "flower-superlin"} <= names
        started = time.monotonic()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 128 + signal.SIGINT
        while (left := running(mark) | {pid for pid in seen if name_of(pid)}) and time.monotonic() < started + 60:
            time.sleep(0.5)
        assert left == set()
        assert command.stderr is not None
        assert "ended by SIGINT" in command.stderr.read()
        assert not (tmp_path / "new").exists()
        assert list(tmp_path.glob("fedrebasin-*")) == []
    finally:
        command.kill()
        command.wait()


@pytest.mark.slow
def test_an_interrupt_keeps_the_seeds_that_were_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = [*COMMAND, "--strategies", "fedavg", "--start", "common", "--rounds", "1", "--epochs", "1"]
    call += ["--seeds", ",".join(map(str, range(50))), "--output", str(out)]
    command = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment("EARLY=1", tmp_path))
    try:
        read_until(command, "seed 2, round 1")
        command.send_signal(signal.SIGINT)
        said = command.communicate(timeout=60)[1]
        assert command.returncode == 128 + signal.SIGINT
        assert f"kept in {out}: seed 0, 1" in said
        results = load_results(out / "results.json")
        seeds = [run["seed"] for run in results["runs"]]
        assert seeds[:2] == [0, 1]
        assert [*seeds, *results["unfinished"]] == list(range(50))
        assert len(results["baselines"]) == len(seeds)
    finally:
        command.kill()
        command.wait()


def read_until(command: subprocess.Popen[str], text: str) -> None:
    """Wait until the command has said a text on stderr."""
    assert command.stderr is not None
    said = ""
    while text not in said:
        line = command.stderr.readline()
        assert line, said
        said += line


def environment(mark: str, temporary: Path) -> dict[str, str]:
    """This one's, with a mark that all processes of the run inherit, and a folder of its own for temporary files."""
    name, value = mark.split("=")
    return {**os.environ, name: value, "TMPDIR": str(temporary)}


def name_of(pid: int) -> str:
    """The command's name; empty where it has ended."""
    try:
        before, _, after = (PROC / str(pid) / "stat").read_text().rpartition(")")
    except OSError:
        return ""
    return "" if after.split()[0] in "ZX" else before.partition("(")[2]


def running(mark: str) -> set[int]:
    """All processes whose environment holds the mark."""
    found = set()
    for path in PROC.glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes() and name_of(int(path.name)):
                found.add(int(path.name))
        except OSError:
            continue
    return found


def descendants(pid: int) -> set[int]:
    """Children, their children and so on."""
    parents = {}
    for path in PROC.glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found
