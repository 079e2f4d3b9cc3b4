"""checkpoint_dir: killed runs go on to the same bits, and what lies in the folder is never trusted."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_run import ROUNDS, run, to_bytes
from flower_messages import warnings  # noqa: F401
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from fedrebasin.errors import UsageError
from fedrebasin.strategies.state import decode, encode


def histories(result: Result) -> list[dict[int, dict[str, object]]]:
    """All metrics but the seconds, which differ."""
    kept = (result.train_metrics_clientapp, result.evaluate_metrics_clientapp, result.evaluate_metrics_serverapp)
    return [
        {
            number: {key: value for key, value in record.items() if "seconds" not in key}
            for number, record in one.items()
        }
        for one in kept
    ]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize(
    "inner, kill_at", [("adam", "train 3"), ("momentum", "between 3"), ("privacy", "saving 2"), ("adam", "train 1")]
)
def test_a_run_that_is_killed_goes_on_to_the_bits_of_one_that_is_not(inner: str, kill_at: str, tmp_path: Path) -> None:
    uninterrupted = run(inner, None)
    script = [sys.executable, str(Path(__file__).with_name("checkpoint_run.py")), inner, str(tmp_path), kill_at]
    paths = os.pathsep.join(path for path in sys.path if path)
    killed = subprocess.run(script, env={**os.environ, "PYTHONPATH": paths}, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    done = int(kill_at.split()[1]) - 1
    whole = sorted(path.name for path in tmp_path.glob("round-*"))
    assert whole[-1] == f"round-{done:06d}" and len(whole) <= 2
    resumed = run(inner, tmp_path)
    assert list(tmp_path.glob(".*")) == []
    assert to_bytes(resumed.arrays) == to_bytes(uninterrupted.arrays)
    assert histories(resumed) == histories(uninterrupted)


def test_a_finished_run_returns_its_result_and_more_rounds_go_on_from_it(tmp_path: Path) -> None:
    short = run("adam", tmp_path, rounds=2)
    again = run("adam", tmp_path, rounds=2)
    assert to_bytes(again.arrays) == to_bytes(short.arrays) and histories(again) == histories(short)
    assert to_bytes(run("adam", tmp_path).arrays) == to_bytes(run("adam", None).arrays)


def test_the_model_of_a_checkpoint_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    result = run("momentum", tmp_path, rounds=1)
    loaded = load_file(tmp_path / "round-000001" / "model.safetensors")
    assert {name: values.tobytes() for name, values in loaded.items()} == to_bytes(result.arrays)


def test_a_checkpoint_of_another_model_or_strategy_is_refused(tmp_path: Path) -> None:
    run("adam", tmp_path, rounds=1)
    with pytest.raises(
        UsageError, match=r"it has '0.weight' as \(12, 5\) float32, not \(9, 5\) float32; give a folder"
    ):
        run("adam", tmp_path, width=9)
    with pytest.raises(UsageError, match="the run there used FedAdam, this one FedAvgM; take the same strategy, or"):
        run("momentum", tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (os.system, ("touch exploded",))


def test_a_hostile_or_broken_file_is_refused_and_nothing_in_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "kept"
    run("adam", folder, rounds=1)
    newest = folder / "round-000001"
    facts = (newest / "round.json").read_text()
    state = (newest / "state.safetensors").read_bytes()
    deep = "[" * 100_000
    swapped = json.loads(facts)
    swapped["strategies"][0]["state"] = {"aggregate_train": {"value": 1}, "m_t": {"array": "nowhere"}}
    odd = json.loads(facts)
    generator = {"bit_generator": {"value": "PCG64"}, "state": {"dict": {"state": {"value": -1}, "inc": {"value": 1}}}}
    odd["strategies"][0]["state"] = {"m_t": {"generator": {"dict": generator}}}
    text, known = json.loads(facts), json.loads(facts)
    text["strategies"][0]["state"] = {"min_train_nodes": {"value": "many"}}
    known["beside"]["dict"]["trajectories"] = {"dict": {"partition 1": {"value": 3}}}
    moments, model = load_file(newest / "state.safetensors"), load_file(newest / "model.safetensors")
    moments["strategy/0/m_t/0.bias"] = moments["strategy/0/m_t/0.bias"][None]
    model["0.bias"][0] = np.nan
    broken: list[tuple[str, bytes]] = [
        ("state.safetensors", save(moments)),
        ("model.safetensors", save(model)),
        ("round.json", json.dumps(text).encode()),
        ("round.json", json.dumps(known).encode()),
        ("state.safetensors", pickle.dumps(Bomb())),
        ("model.safetensors", pickle.dumps(Bomb())),
        ("state.safetensors", state[: len(state) // 2]),
        ("state.safetensors", b"\xff" * 64),
        ("round.json", b"{}"),
        ("round.json", deep.encode()),
        ("round.json", facts.replace('"round": 1', '"round": 7').encode()),
        ("round.json", json.dumps(swapped).encode()),
        ("round.json", json.dumps(odd).encode()),
        ("round.json", json.dumps({**json.loads(facts), "random": {"python": [3, None], "numpy": {}}}).encode()),
    ]
    for name, data in broken:
        good = (newest / name).read_bytes()
        (newest / name).write_bytes(data)
        with pytest.raises(
            UsageError, match=r"(?s)checkpoint_dir: .*remove that folder to go on from the round before$"
        ):
            run("adam", folder)
        (newest / name).write_bytes(good)
    assert not (tmp_path / "exploded").exists()
    assert to_bytes(run("adam", folder).arrays) == to_bytes(run("adam", None).arrays)


def test_methods_of_the_strategy_are_not_overwritten(tmp_path: Path) -> None:
    run("adam", tmp_path, rounds=1)
    page = tmp_path / "round-000001" / "round.json"
    facts = json.loads(page.read_text())
    facts["strategies"][0]["state"] |= {"aggregate_train": {"value": 1}, "new": {"value": 2}}
    page.write_text(json.dumps(facts))
    assert to_bytes(run("adam", tmp_path).arrays) == to_bytes(run("adam", None).arrays)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: (os error 27)")])
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],  # noqa: F811
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedrebasin.strategies.checkpoint.save_file", full)
    result = run("adam", tmp_path)
    assert to_bytes(result.arrays) == to_bytes(run("adam", None).arrays)
    assert sum("is not kept in" in line for line in warnings) == ROUNDS + 1
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_kept_where_folders_cannot_be_opened_and_what_is_only_read_not_synced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],  # noqa: F811
) -> None:
    """So it is on Windows."""
    opened, synced = os.open, os.fsync

    def open_file(path: Any, *rest: Any, **options: Any) -> int:
        if path == tmp_path:
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **options)

    def sync(descriptor: int) -> None:
        os.write(descriptor, b"")
        synced(descriptor)

    monkeypatch.setattr("fedrebasin.strategies.checkpoint.os.open", open_file)
    monkeypatch.setattr("fedrebasin.strategies.checkpoint.os.fsync", sync)
    run("adam", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-{ROUNDS - 1:06d}", f"round-{ROUNDS:06d}"]
    assert not any("is not kept in" in line for line in warnings)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written .*; give a folder that can$"):
        run("adam", tmp_path / "file")


def test_all_kinds_of_values_come_back() -> None:
    arrays: dict[str, np.ndarray] = {}
    value = {"a": [np.float32(1.5), 2.5, None, "x", True], "b": (np.arange(3), np.array(7)), "c": {}}
    found = decode(json.loads(json.dumps(encode(value, "here", arrays))), arrays)
    assert found["a"][1:] == [2.5, None, "x", True] and found["a"][0].dtype == np.float32
    assert found["b"][0].tolist() == [0, 1, 2] and found["b"][1].shape == () and found["c"] == {}
    with pytest.raises(TypeError, match="object is no number, text, array"):
        encode(object(), "here", arrays)


def test_safetensors_holds_what_numpy_generators_need(tmp_path: Path) -> None:
    save_file({"words": np.arange(4, dtype=np.uint32)}, tmp_path / "file")
    assert load_file(tmp_path / "file")["words"].dtype == np.uint32
