"""fedrebasin merge: the merged file, what it says of itself, memory, and that nothing is ever half-written."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_cases import NET, USER_CODE, Net, hidden_files, load, output_of, plant, random_state, run, save
from torch import Tensor, nn

from fedrebasin import PermutationSpec, check_spec, match_many, merge, permute, trace, weight_matching
from fedrebasin.simulations import merge_command
from fedrebasin.simulations.merge_data import read_calibration
from fedrebasin.simulations.merge_memory import resident
from fedrebasin.stored import StoredState

pytestmark = pytest.mark.usefixtures("folder")
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def spec_of() -> PermutationSpec:
    inputs = (torch.randn(2, 3, 8, 8),)
    return check_spec(Net(), trace(Net(), inputs), inputs)


@pytest.mark.parametrize("count", [2, 3])
def test_permuted_copies_merge_back_to_the_same_function(count: int, folder: Path) -> None:
    state = plant(folder, count)
    names = " ".join(f"{name}.safetensors" for name in "abc"[:count])
    assert run(f"{names} {NET} --output out.safetensors") == 0
    merged = load("out.safetensors")
    assert list(StoredState("out.safetensors")) == list(StoredState("a.safetensors"))
    assert all(merged[name].dtype == tensor.dtype for name, tensor in state.items())
    torch.testing.assert_close(output_of(merged, IMAGES), output_of(state, IMAGES))


def test_coefficients_methods_and_references_are_those_of_the_functions(folder: Path) -> None:
    spec, states = spec_of(), [random_state(seed) for seed in range(3)]
    for name, state in zip("abc", states, strict=True):
        save(folder / f"{name}.safetensors", state)
    files = "a.safetensors b.safetensors c.safetensors"
    weights = [0.5, 0.3, 0.2]
    assert run(f"{files} {NET} --output joint.safetensors --coefficients .5,.3,.2 --method merge-many --seed 4") == 0
    many = match_many(spec, states, coefficients=weights, seed=4)
    expected = merge([permute(spec, p, s) for p, s in zip(many.perms, states, strict=True)], coefficients=weights)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load("joint.safetensors").items())
    assert run(f"{files} {NET} --output out.safetensors --coefficients 5,3,2 --reference b.safetensors") == 0
    aligned = [permute(spec, weight_matching(spec, states[1], state).perms, state) for state in states]
    expected = merge(aligned, coefficients=weights)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load("out.safetensors").items())


def test_straight_through_many_learns_from_calibration_data_with_labels(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = [random_state(seed) for seed in range(3)]
    for name, state in zip("abc", states, strict=True):
        save(folder / f"{name}.safetensors", state)
    images = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
    np.savez("data.npz", x=images, y=np.arange(60) % 4)
    line = f"a.safetensors b.safetensors c.safetensors {NET} --method straight-through-many"
    assert run(f"{line} --output out.safetensors --calibration data.npz") == 0
    batches, _ = read_calibration(folder / "data.npz", (3, 8, 8))
    data = {"net": Net(), "batches": batches, "loss": nn.functional.cross_entropy}
    found = match_many(spec_of(), states, method="straight-through-many", **data)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all([name, f"{value:.6g}"] in rows for name, value in found.measures.items()) and "loss" in found.measures
    expected = merge([permute(spec_of(), p, s) for p, s in zip(found.perms, states, strict=True)])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load("out.safetensors").items())


def test_the_file_says_where_it_comes_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(folder)
    line = f"a.safetensors b.safetensors {NET} --output out.safetensors --coefficients 3,1 --seed 2"
    monkeypatch.setattr("sys.argv", ["fedrebasin", "merge", *line.split()])
    assert run(line) == 0
    metadata = StoredState("out.safetensors").metadata
    told = json.loads(metadata["fedrebasin"])
    assert metadata["format"] == "pt"
    assert told["command"].startswith("fedrebasin") and "--output FILE" in told["command"]
    assert {"fedrebasin", "torch", "python"} <= set(told["versions"])
    assert told["inputs"][1] == {
        "file": "b.safetensors",
        "sha256": hashlib.sha256((folder / "b.safetensors").read_bytes()).hexdigest(),
        "coefficient": 0.25,
    }
    assert (told["matching"], told["method"], told["reference"]) == ("weight", "reference", "a.safetensors")
    assert told["correction"] is None and told["objective"] > told["objective-before"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_computed_wide_and_written_narrow(dtype: torch.dtype, folder: Path) -> None:
    plant(folder)
    for name in "ab":
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load(f"{name}.safetensors").items()}
        save(folder / f"{name}.safetensors", state)
    assert run(f"a.safetensors b.safetensors {NET} --output out.safetensors") == 0
    first, merged = load("a.safetensors"), load("out.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in first.items())
    assert run(f"a.safetensors b.safetensors {NET} --output out8.safetensors --memory {resident() + 10**8}") == 0


def limit_for(files: list[str], spec: PermutationSpec) -> int:
    """So much memory that tensors one by one fit, and the models do not."""
    needs = merge_command.needs_of(spec, [StoredState(file) for file in files])
    assert needs.streamed is not None and needs.streamed < needs.held
    return (needs.streamed + needs.held) // 2


@pytest.mark.parametrize("count", [2, 3])
def test_a_merge_tensor_by_tensor_writes_the_same_bytes(
    count: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of()
    spec.save("spec.json")
    files = [f"{name}.safetensors" for name in "abc"[:count]]
    for seed, file in enumerate(files):
        save(folder / file, random_state(seed))
    monkeypatch.setattr("fedrebasin.simulations.merge_memory.resident", lambda: 0)
    line = f"{' '.join(files)} --spec spec.json --reference b.safetensors --coefficients {'2,' * (count - 1)}1"
    assert run(f"{line} --output out.safetensors") == 0
    found: list[Any] = []
    original = merge_command.streams
    monkeypatch.setattr(merge_command, "streams", lambda *args: found.append(original(*args)) or found[-1])
    assert run(f"{line} --output out2.safetensors --memory {limit_for(files, spec)}") == 0
    assert found == [True]
    held, streamed = load("out.safetensors"), load("out2.safetensors")
    assert all(torch.equal(streamed[name], tensor) for name, tensor in held.items())
    assert hidden_files(folder) == ["out.safetensors", "out2.safetensors"]


def test_the_order_of_files_of_two_types_does_not_change_what_memory_is_expected(folder: Path) -> None:
    state = plant(folder)
    save(folder / "b.safetensors", {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()})
    files = [StoredState(f"{name}.safetensors") for name in "ab"]
    first, second = (merge_command.needs_of(spec_of(), order, base=0).held for order in (files, files[::-1]))
    assert first == second


def test_what_does_not_fit_names_the_figure_that_would_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(folder, 3)
    spec_of().save("spec.json")
    line = "a.safetensors b.safetensors --spec spec.json --output out.safetensors"
    assert run(f"{line} --memory 1MB") == 2
    said = capsys.readouterr().err
    assert "the largest tensors and permutations need about" in said and "got 1 MB" in said and said.count("\n") == 1
    assert run(f"c.safetensors {line} --method merge-many --memory 1MB") == 2
    assert "--method merge-many needs the models as a whole, about" in capsys.readouterr().err
    assert run(f"a.safetensors b.safetensors {NET} --output out.safetensors --memory 1MB") == 2
    assert "the proof of the traced spec needs about" in capsys.readouterr().err
    assert hidden_files(folder) == []


def test_a_dry_run_tells_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(folder)
    np.savez("data.npz", x=IMAGES.numpy(), y=np.arange(5) % 4)
    before = sorted(file.name for file in folder.iterdir())
    assert run(f"a.safetensors b.safetensors {NET} --dry-run --calibration data.npz --output out.safetensors") == 0
    said = capsys.readouterr().out
    assert ("loss barrier" in said and "-0.0000 aligned" in said) or "0.0000 aligned" in said
    assert "hidden" in said and "expected" in said and "none (--dry-run)" in said
    after = [file.name for file in folder.iterdir() if file.name != "__pycache__"]
    assert sorted(after) == before


def test_a_failure_midway_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(folder)
    original = merge_command.averaged

    def failing(*args: Any) -> Iterator[tuple[str, Tensor]]:
        for place, one in enumerate(original(*args)):
            if place == 3:
                signal.raise_signal(signal.SIGTERM)
            yield one

    monkeypatch.setattr(merge_command, "averaged", failing)
    assert run(f"a.safetensors b.safetensors {NET} --output out.safetensors") == 128 + 15
    assert hidden_files(folder) == []


def test_an_output_that_is_there_is_replaced_only_by_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(folder)
    (folder / "out.safetensors").write_text("before")
    assert run(f"a.safetensors b.safetensors {NET} --output out.safetensors") == 2
    assert "is there already" in capsys.readouterr().err and (folder / "out.safetensors").read_text() == "before"
    assert run(f"a.safetensors b.safetensors {NET} --output out.safetensors --force") == 0
    assert set(load("out.safetensors")) == set(load("a.safetensors"))


def test_a_tensor_under_two_names_may_be_in_the_file_once(folder: Path) -> None:
    state = {"table.weight": torch.randn(9, 8), "hidden.weight": torch.randn(8, 8), "hidden.bias": torch.randn(8)}
    order = torch.tensor([1, 0, 2, 3, 4, 5, 7, 6])
    moved = {
        "table.weight": state["table.weight"][:, order],
        "hidden.weight": state["hidden.weight"][order][:, order],
        "hidden.bias": state["hidden.bias"][order],
    }
    save(folder / "a.safetensors", state)
    save(folder / "b.safetensors", {name: tensor.contiguous() for name, tensor in moved.items()})
    line = "a.safetensors b.safetensors --model merged_nets:Shared --input 2x4:int64"
    assert run(f"{line} --output out.safetensors") == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in load("out.safetensors").items())
    np.save("tokens.npy", np.arange(40).reshape(10, 4) % 9)
    data = "--calibration tokens.npy --matching activation+weight --correction least-squares"
    assert run(f"{line} {data} --output out2.safetensors") == 0
    assert set(load("out2.safetensors")) == set(state)


def test_the_picture_shows_units_before_and_after(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(folder, 3)
    np.save("images.npy", torch.randn(40, 3, 8, 8).numpy())
    drawn: list[Any] = []
    original = merge_command.similarity_panel
    monkeypatch.setattr(merge_command, "similarity_panel", lambda found: drawn.extend(found) or original(found))
    line = f"a.safetensors b.safetensors c.safetensors {NET} --dry-run --calibration images.npy --plot out.png"
    assert run(line) == 0
    assert (folder / "out.png").read_bytes()[1:4] == b"PNG"
    assert len(drawn) == 2  # b and c against a
    aligned, plain, cka = (drawn[0][line] for line in ("aligned", "plain", "cka"))
    assert list(plain) == ["body.0", "hidden", "head"]
    assert all(value == pytest.approx(1, abs=1e-3) for value in (*aligned.values(), *cka.values()))
    assert plain["body.0"] < 0.8 and plain["hidden"] < 0.8 and plain["head"] == pytest.approx(1, abs=1e-3)
    assert run(line) == 2


def test_the_line_of_the_usage_runs(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "module.py").write_text(USER_CODE.replace("width * 36", "width * 900"))
    for name in "ab":
        torch.manual_seed(ord(name))
        state = {**random_state(1), "hidden.weight": torch.randn(7, 5400)}
        save(folder / f"{name}.safetensors", state)
    files = "a.safetensors b.safetensors"
    assert run(f"{files} --model package.module:Net --input 1x3x32x32 --output merged.safetensors") == 0
    sys.modules.pop("package.module", None)
    sys.modules.pop("package", None)
