"""``fedrebasin merge`` and networks of odd inputs, outputs and weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from merge_cases import NET, load, plant, run, save

FILES = "a.safetensors b.safetensors"
CALIBRATED = "--calibration c.npz --output out.safetensors"


@pytest.fixture(autouse=True)
def planted(folder: Path) -> None:
    plant(folder)
    np.savez("c.npz", x=np.random.default_rng(0).normal(size=(120, 3, 8, 8)), y=np.arange(120) % 4)


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("fedrebasin: ") and said.count("\n") == 1 and not Path("out.safetensors").exists()
    return said


@pytest.mark.parametrize("options", ["--dry-run", "--matching straight-through", "--matching sinkhorn"])
@pytest.mark.parametrize(("net", "got"), [("Pair", "got a tuple"), ("Summed", "got a tensor (2,)")])
def test_labels_for_a_network_without_class_scores_are_refused(
    options: str, net: str, got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(f"{FILES} --model merged_nets:{net} --input 2x3x8x8 {CALIBRATED} {options}", capsys)
    assert "--calibration: labels need a network whose output is one tensor (examples, classes, ...)" in said
    assert got in said


def test_labels_in_a_column_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("c.npz", x=np.zeros((5, 3, 8, 8)), y=np.zeros((5, 1), dtype=int))
    assert "got a tensor (2, 4) and labels (2, 1)" in refused(f"{FILES} {NET} {CALIBRATED} --dry-run", capsys)


def test_tokens_that_the_network_has_no_row_for_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.zeros((150, 3), dtype=np.int64)
    tokens[7, 2] = 9
    np.savez("c.npz", x=tokens)
    torch.manual_seed(0)
    for name in "ab":
        state = {"table.weight": torch.randn(9, 8), "hidden.weight": torch.randn(8, 8), "hidden.bias": torch.randn(8)}
        save(Path(f"{name}.safetensors"), state)
    line = f"{FILES} --model merged_nets:Shared --input int64:2x3 {CALIBRATED} --matching activation"
    assert "--calibration: the network cannot be run on these examples (IndexError" in refused(line, capsys)


@pytest.mark.parametrize(
    "options",
    ["--matching activation", "--matching straight-through", "--matching sinkhorn", "--correction repair", "--dry-run"],
)
def test_an_input_that_goes_by_its_name_is_calibrated_with(options: str) -> None:
    assert run(f"{FILES} --model merged_nets:Named --input x=2x3x8x8 {CALIBRATED} {options}") == 0


def test_complex_weights_that_no_permutation_moves_are_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    turns = [torch.tensor([1j, 1, 2, 3]), torch.tensor([1, 1j, -2, 1])]
    for name, turn in zip("ab", turns, strict=True):
        save(Path(f"{name}.safetensors"), {**load(f"{name}.safetensors"), "turn": turn})
    line = f"{FILES} --model merged_nets:Turned --input 2x3x8x8 --output out.safetensors"
    assert run(line) == 0
    torch.testing.assert_close(load("out.safetensors")["turn"], (turns[0] + turns[1]) / 2)
    Path("out.safetensors").unlink()
    save(Path("b.safetensors"), {**load("b.safetensors"), "turn": turns[1] * torch.nan})
    assert "b.safetensors: 'turn' holds a NaN or an infinity" in refused(line, capsys)


def test_a_network_without_permutations_is_averaged_by_every_method() -> None:
    torch.manual_seed(0)
    for name in "ab":
        save(Path(f"{name}.safetensors"), {"head.weight": torch.randn(4, 192), "head.bias": torch.randn(4)})
    line = f"{FILES} --model merged_nets:Flat --input 2x3x8x8 {CALIBRATED} --force"
    for method in ("--method straight-through-many", "--matching straight-through", "--matching activation"):
        assert run(f"{line} {method}") == 0
        torch.testing.assert_close(
            load("out.safetensors")["head.bias"],
            (load("a.safetensors")["head.bias"] + load("b.safetensors")["head.bias"]) / 2,
        )


def test_the_network_of_the_other_tests_takes_this_data() -> None:
    assert run(f"{FILES} {NET} {CALIBRATED} --matching straight-through") == 0
