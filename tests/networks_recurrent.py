"""Small networks with recurrent layers, for :mod:`networks_zoo`; the shapes are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_version import TORCH

STEPS = (torch.zeros(2, 7, 5),)
# torch 2.9 exports an LSTM's last states with one axis too many, and one that reads them keeps its units fixed
LAST_STATES = TORCH >= (2, 10)
LSTM = {"batch_first": True}


class Recurrent(nn.Module):
    """A recurrent layer, whose outputs and last states are read; perhaps with learned first states."""

    def __init__(self, core: nn.Module, width: int, first: tuple[tuple[int, ...], ...] = ()) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(width, 3)
        self.first = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in first)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = tuple(state.expand(-1, len(x), -1) for state in self.first)
        out, last = self.core(x, states if len(states) > 1 else states[0]) if states else self.core(x)
        last = last if isinstance(last, tuple) else (last,)
        if isinstance(self.core, nn.LSTM) and not LAST_STATES:
            return (self.head(out),)
        return self.head(out), *(state.norm(dim=-1) for state in last)


class Cells(nn.Module):
    """Three cells, unrolled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(5, 6), nn.GRUCell(6, 4), nn.RNNCell(4, 7, nonlinearity="relu")
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = (x.new_zeros(len(x), 6), x.new_zeros(len(x), 6))
        two, three = x.new_zeros(len(x), 4), x.new_zeros(len(x), 7)
        for step in x.unbind(1):
            one = self.lstm(step, one)
            two = self.gru(one[0], two)
            three = self.rnn(two, three)
        return self.head(three)


RECURRENT: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], list[tuple[int, ...]]]]] = {
    "lstm": lambda: (Recurrent(nn.LSTM(5, 6, **LSTM), 6), STEPS, [(6,)]),
    "lstm-projected-both-ways": lambda: (
        Recurrent(nn.LSTM(5, 6, 2, proj_size=4, bidirectional=True, **LSTM), 8),
        STEPS,
        [(4,)] * 4 + [(6,)] * 4,
    ),
    "lstm-learned-states": lambda: (
        Recurrent(nn.LSTM(5, 6, 2, **LSTM), 6, ((2, 1, 6), (2, 1, 6))),
        STEPS,
        [(6,), (6,)],
    ),
    "gru": lambda: (Recurrent(nn.GRU(5, 6, 2, bias=False, **LSTM), 6), STEPS, [(6,), (6,)]),
    "gru-learned-state": lambda: (Recurrent(nn.GRU(5, 6, **LSTM), 6, ((1, 1, 6),)), STEPS, [(6,)]),
    "rnn-both-ways": lambda: (Recurrent(nn.RNN(5, 6, bidirectional=True, **LSTM), 12), STEPS, [(6,), (6,)]),
    "rnn-relu": lambda: (Recurrent(nn.RNN(5, 6, nonlinearity="relu"), 6), STEPS, [(6,)]),
    "cells": lambda: (Cells(), STEPS, [(4,), (6,), (7,)]),
}
