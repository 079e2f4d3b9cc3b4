"""Python 3.14 looks annotations up when they are read: names that are there for type checkers alone do no harm."""

from __future__ import annotations

import sys

import pytest
import torch

import fedrebasin as fr
from fedrebasin.errors import TraceError
from fedrebasin.signatures import parameters_of

SOURCE = """
from typing import TYPE_CHECKING
import torch
if TYPE_CHECKING:
    from nowhere import Images

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)

    def forward(self, x: Images, mask: Images = None) -> Images:
        return self.last(self.first(x).relu())

def make(width: Images = 3) -> Net:
    return Net()
"""


def test_parameters_have_their_names_and_defaults() -> None:
    found = parameters_of(torch.nn.functional.relu)
    assert list(found) == ["input", "inplace"] and found["inplace"].default is False
    with pytest.raises(TypeError):
        parameters_of(3)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated where they stand")
def test_names_for_type_checkers_alone_are_not_looked_up() -> None:
    names: dict[str, object] = {"__name__": "user"}
    exec(compile(SOURCE, "user.py", "exec", dont_inherit=True), names)  # a file of its own, as a user's
    make = names["make"]
    assert list(parameters_of(make)) == ["width"]  # type: ignore[arg-type]
    net, x = make(), torch.randn(64, 3)  # type: ignore[operator]
    state = net.state_dict()
    assert len(fr.repair(net, state, [state, state], [x])) == len(state), "forward's inputs are counted"
    with pytest.raises(TraceError, match="from __future__ import annotations"):
        fr.trace(net, (x,))
