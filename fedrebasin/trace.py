"""trace(model, example_inputs): the permutation spec of a model, read off its exported graph.

The graph of ``torch.export`` is walked once (:mod:`fedrebasin.walk`). Every tensor is a list of axes
(:mod:`fedrebasin.axes`); one rule per op (:mod:`fedrebasin.rules`) says which axes the op ties. Inputs and
outputs are fixed, parameters start free, and what is free at the end may be permuted without changing the
network's function. What only training uses (auxiliary heads, averages behind a codebook) is tied by a second graph.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fedrebasin.axes import leaf
from fedrebasin.axes.families import settle
from fedrebasin.axes.freeze import freeze_all
from fedrebasin.axes.reach import fix_unread
from fedrebasin.export import Exported, alone, export_model
from fedrebasin.memory import identity, overlapping
from fedrebasin.spec import PermutationSpec
from fedrebasin.trace_notes import trace_notes
from fedrebasin.walk import Walk


def trace(model: nn.Module, example_inputs: Any, *, strict: bool = False) -> PermutationSpec:
    """Derive which axes of which tensors of ``model`` one permutation ties.

    Parameters
    ----------
    model : nn.Module
        Its weights and its training mode are left as they are.
    example_inputs : Tensor, tuple or dict
        What the model is called with: one input, positional inputs, or keywords.
    strict : bool
        Raise on the first op that no rule covers, instead of fixing the axes that it touches.

    Returns
    -------
    PermutationSpec
        Not yet proved: pass it to :func:`fedrebasin.check_spec`.

    Raises
    ------
    TraceError
        If ``torch.export`` cannot export the model with these inputs, or the way through it depends on the data, and
        those that could be followed leave parameters out.
    UnsupportedOpError
        With ``strict``, if an op has no rule.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Section 3, where such specs are written by hand.

    Examples
    --------
    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = trace(net, (torch.randn(3, 4),))
    >>> spec.tied["0"]
    (Axis(name='0.weight', dim=0), Axis(name='0.bias', dim=0), Axis(name='2.weight', dim=1))
    """
    return spec_of(export_model(model, example_inputs), strict=strict)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Without garbage collection: one pass over all that torch and an export hold takes longer than the whole walk."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@alone()
@_collection_paused()
def spec_of(exported: Exported, *, strict: bool = False) -> PermutationSpec:
    """Walk the graphs and turn the tied axes into a spec; parameters and raised errors as for :func:`trace`."""
    walk = Walk(exported.state, strict=strict)
    for program in exported.programs:
        walk.program(program)
    views = _fix_what_stays(exported, walk)
    settle(walk.traced.tensors)
    parts = fix_unread({name: value.axes for name, value in walk.parameters.items()}, walk.reads)
    if parts:
        settle(walk.traced.tensors)
    axes = freeze_all(
        {
            name: walk.parameters[name].axes
            if name in walk.parameters
            else [leaf(size, "not in the exported graph") for size in tensor.shape]
            for name, tensor in exported.state.items()
        }
    )
    return PermutationSpec(
        axes=axes,
        buffers=tuple(name for name in exported.state if name not in exported.parameters),
        uses=walk.uses,
        notes=tuple(trace_notes(exported, walk, axes, parts, views)),
        inputs=exported.inputs,
        training=exported.training,
    )


def _fix_what_stays(exported: Exported, walk: Walk) -> list[str]:
    """Fix views of one memory (whose names are returned), constant tables and what evaluation does not use."""
    state = exported.state
    used, shared = {identity(state[name]) for name in walk.uses}, overlapping(state)
    views = [name for name in walk.parameters if identity(state[name]) in shared]
    for name in views:
        walk.traced.fix(walk.parameters[name], "shares memory with another tensor")
    for name, value in walk.parameters.items():
        if name not in exported.parameters and name not in walk.traced.statistics | exported.written:
            walk.traced.fix(value, "table that training does not change")
        elif identity(state[name]) not in used:
            walk.traced.fix(value, f"not used in evaluation mode{exported.failure and '; training mode fails'}")
    return views
