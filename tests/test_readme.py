"""The README's code runs, and its tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import nn

from fedrebasin.simulations import readme

README = Path(__file__).resolve().parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_tables_are_those_of_the_committed_results() -> None:
    assert readme.render(TEXT) == TEXT


def test_every_picture_and_result_that_the_text_names_is_there() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (README.parent / path).is_file(), path


def test_the_plain_pytorch_example_runs(capsys: Any) -> None:
    block = next(block for block in BLOCKS if "merge_modules" in block)
    exec(compile(block, "README.md", "exec"), {})
    assert "perms" in capsys.readouterr().out


def test_the_flower_example_makes_a_strategy() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).relu().mean((2, 3)))

    block = next(block for block in BLOCKS if "strategy = FedRebasin" in block)
    code, _, start = block.partition("result = ")
    names: dict[str, Any] = {"Net": Net, "torch": torch, "ArrayRecord": ArrayRecord}
    exec(compile(code, "README.md", "exec"), names)
    assert start.startswith("strategy.start(grid=grid, initial_arrays=ArrayRecord(")
    assert list(names["strategy"].spec.perm_shapes) == ["conv"]


def test_the_example_of_a_federated_correction_registers_a_handler_and_makes_a_strategy() -> None:
    block = next(block for block in BLOCKS if "answer_queries" in block)
    names: dict[str, Any] = {
        "Net": lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
        "inputs": (torch.randn(2, 4),),
        "my_batches": lambda context: [torch.randn(8, 4)],
    }
    exec(compile(block, "README.md", "exec"), names)
    assert "query.rebasin" in names["app"]._registered_funcs
    assert names["strategy"].correction == "federated-least-squares"
