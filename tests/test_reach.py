"""What the example inputs do not reach of a parameter stays fixed, and is noted; what they reach keeps its freedom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedrebasin import check_spec, permute, random_perms, trace


class Positions(nn.Module):
    """Learned positions, cut to the length of the input."""

    def __init__(self, changed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.table = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(1, 8, 6))
        self.changed = changed

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last((self.first(x) + self.changed(self.table)[:, : x.shape[1]]).relu())
        return found


class Steps(nn.Module):
    """As many steps as asked for, each with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.weights = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(5, 6, 6))

    def forward(self, x: Tensor, steps: int) -> Tensor:
        x = self.first(x)
        for step in range(steps):
            x = torch.tanh(x @ self.weights[step])
        found: Tensor = self.last(x)
        return found


class Slim(nn.Module):
    """A hidden layer of which the first units are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, width: int) -> Tensor:
        x = F.linear(x, self.first.weight[:width], self.first.bias[:width]).relu()
        return F.linear(x, self.last.weight[:, :width], self.last.bias)


LINE = torch.randn(2, 8, 3)
CASES: dict[str, tuple[nn.Module, tuple[Any, ...], tuple[Any, ...], list[tuple[int, ...]]]] = {
    "positions": (Positions(lambda table: table), (LINE[:, :5],), (LINE,), [(6,)]),
    "scaled positions": (Positions(lambda table: 2 * table.tanh()), (LINE[:, :5],), (LINE,), [(6,)]),
    "positions turned": (Positions(lambda table: table.mT.clone().mT), (LINE[:, :5],), (LINE,), [(6,)]),
    "steps": (Steps(), (LINE[0], 2), (LINE[0], 5), [(6,)]),
    "width": (Slim(), (LINE[0], 4), (LINE[0], 8), [(4,)]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_inputs_do_not_reach_is_fixed_and_noted_and_other_inputs_keep_the_function(case: str) -> None:
    net, inputs, more, shapes = CASES[case]
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    assert list(spec.perm_shapes.values()) == shapes
    assert len(spec.notes) == 1 and "the example inputs reach only a part of" in spec.notes[0]
    moved = permute(spec, random_perms(spec, 1), net.state_dict())
    for given in (inputs, more):
        torch.testing.assert_close(functional_call(net, moved, given), net(*given))


class Stream(nn.Module):
    """A stream whose head reads a part of it, after blocks that read all of it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(3, 6), block, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = self.last((x + self.block(x).tanh())[..., :4])
        return found


@pytest.mark.parametrize("block", [nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))])
def test_units_that_one_op_reads_are_free_whatever_others_leave_out(block: nn.Module) -> None:
    net, inputs = Stream(block), (LINE[0],)
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    assert {(2,), (4,)} <= set(spec.perm_shapes.values()) and spec.notes == ()
