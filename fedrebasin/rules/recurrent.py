"""Rules for recurrent layers. Gates are segments of axis 0 that share one permutation; the order of time is fixed.

A cell has ``w_ih`` (gates x cell, in) and ``w_hh`` (gates x cell, hidden), each with an optional bias, and with a
projection ``w_hr`` (hidden, cell). Without one, hidden and cell are one axis, and ``w_hh`` has it on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedrebasin import axes
from fedrebasin.axes import Node
from fedrebasin.rules.parts import stack
from fedrebasin.rules.registry import NotCoveredError, Rule, Traced, Value, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class _Units(NamedTuple):
    """The axes of what a cell gives out and of what it keeps."""

    hidden: Node
    cell: Node


def _cell(traced: Traced, gates: int, into: Node, weights: Sequence[Value]) -> _Units:
    """Tie the axes of one cell's weights: w_ih, w_hh, then biases and a projection."""
    traced.sums = True
    w_ih, w_hh, *more = weights
    projections = [value for value in more if len(value.axes) > 1]
    size = w_ih.axes[0].size // gates
    segments: list[Node] = []
    for value in (w_ih, w_hh, *(value for value in more if len(value.axes) == 1)):
        segments += traced.cut(value.axes[0], [size] * gates)
    cell = traced.tie(*segments)
    traced.tie(w_ih.axes[1], into)
    hidden = cell
    for projection in projections:
        traced.tie(projection.axes[1], cell)
        hidden = projection.axes[0]
    traced.tie(w_hh.axes[1], hidden)
    return _Units(hidden, cell)


def _layers(gates: int) -> Rule:
    """The rule for layers of cells, each in one direction or in both, whose results lie side by side."""

    def layers(
        traced: Traced,
        x: Value,
        states: Value | Sequence[Value],
        weights: Sequence[Value],
        biases: bool,
        count: int,
        dropout: float,
        training: bool,
        two_ways: bool,
        batch_first: bool = False,
    ) -> tuple[Value, ...]:
        """(time, batch, in) to (time, batch, hidden of every direction), and the last states (cells, batch, units)."""
        del biases, dropout, training
        states = [states] if isinstance(states, Value) else states
        outer, into = x.axes[:-1], x.axes[-1]
        if len(outer) != 2 or not isinstance(weights, Sequence):  # packed sequences
            raise NotCoveredError
        axes.fix(outer[1 if batch_first else 0], "time")
        batch = outer[0 if batch_first else 1]
        ways = 2 if two_ways else 1
        each = len(weights) // (count * ways)
        found: list[_Units] = []
        for first in range(0, count * ways, ways):
            found += [
                _cell(traced, gates, into, weights[number * each : (number + 1) * each])
                for number in range(first, first + ways)
            ]
            for units in found[first:]:
                traced.within([*outer, into, units.cell])
            into = axes.concat([units.hidden for units in found[first:]])
            traced.within([*outer, into])
        lasts = [stack(traced, [Value([batch, units[kind]]) for units in found]) for kind in range(len(states))]
        for state, last in zip(states, lasts, strict=True):
            for axis, other in zip(state.axes, last.axes, strict=True):
                traced.tie(axis, other)
        return Value([*outer, into]), *lasts

    return layers


def _one_cell(gates: int) -> Rule:
    """The rule for one step of one cell."""

    def step(traced: Traced, x: Value, states: Value | Sequence[Value], *weights: Value | None) -> Any:
        """(batch, in) and states (batch, units) to the next states."""
        units = _cell(traced, gates, x.axes[-1], [value for value in weights if value is not None])
        result = [Value([*x.axes[:-1], units.cell]) for _ in traced.output_shapes]
        for state in [states] if isinstance(states, Value) else states:
            for axis, other in zip(state.axes, result[0].axes, strict=True):
                traced.tie(axis, other)
        return tuple(result) if len(result) > 1 else result[0]

    return step


for _kind, _gates in _GATES.items():
    rule(_kind)(_layers(_gates))
    rule(f"{_kind}_cell")(_one_cell(_gates))
