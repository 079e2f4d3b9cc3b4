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
from fedrebasin.axes.node import ITSELF, OVER_TWICE, TWICE
from fedrebasin.axes.reach import fix_unread
from fedrebasin.copies import note_on
from fedrebasin.export import Exported, alone, export_model
from fedrebasin.layout import Fixed, Layout, leaves
from fedrebasin.memory import identity, overlapping
from fedrebasin.spec import PermutationSpec
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


def _is_tied_to_itself(layout: Layout) -> bool:
    reasons = {reason for end in leaves(layout) if isinstance(end, Fixed) for reason in end.reason.split("; ")}
    return not reasons.isdisjoint((ITSELF, TWICE, OVER_TWICE))


@alone()
@_collection_paused()
def spec_of(exported: Exported, *, strict: bool = False) -> PermutationSpec:
    """Walk the graphs and turn the tied axes into a spec; parameters and raised errors as for :func:`trace`."""
    walk = Walk(exported.state, strict=strict)
    for program in exported.programs:
        walk.program(program)
    state = exported.state
    used = {identity(state[name]) for name in walk.uses}
    shared = overlapping(state)
    mixed = [name for name in walk.parameters if identity(state[name]) in shared]
    for name in mixed:
        walk.traced.fix(walk.parameters[name], "shares memory with another tensor")
    for name, value in walk.parameters.items():
        if name not in exported.parameters and name not in walk.traced.statistics | exported.written:
            walk.traced.fix(value, "table that training does not change")
        elif identity(state[name]) not in used:
            walk.traced.fix(value, f"not used in evaluation mode{exported.failure and '; training mode fails'}")
    settle(walk.traced.tensors)
    parts = fix_unread({name: value.axes for name, value in walk.parameters.items()}, walk.reads)
    if parts:
        settle(walk.traced.tensors)
    found = {
        name: walk.parameters[name].axes
        if name in walk.parameters
        else [leaf(size, "not in the exported graph") for size in tensor.shape]
        for name, tensor in state.items()
    }
    axes = freeze_all(found)
    notes = [
        f"no rule for {op} (first in {where or 'the model'}): its axes stay fixed"
        for op, where in walk.fixed_ops.items()
    ]
    looped = [name for name, layouts in axes.items() if any(map(_is_tied_to_itself, layouts))]
    if looped:
        more, user = f" and {len(looped) - 1} more" * (len(looped) > 1), walk.uses.get(looped[0], "nothing else")
        notes.append(
            f"an axis is tied to a part of itself, or is twice in one axis, in {looped[0]!r}{more} (used by {user}): "
            "what would have to move in two ways at once stays fixed"
        )
    if exported.failure:
        notes.append(
            "some parameters, or buffers that training writes, are not used in evaluation mode, and the model cannot "
            f"be exported in training mode ({exported.failure}): they stay fixed, and further training may see them "
            "beside permuted units"
        )
    elif exported.unused:
        more = " and others" if len(exported.unused) > 1 else ""
        notes.append(
            f"forward uses {exported.unused[0]!r}{more} neither in evaluation nor in training mode: they stay fixed, "
            "and what uses them elsewhere (a training step) may see them beside permuted units; let forward use them, "
            "too, in a module with the same state dict, or fix what they read by spec.fix"
        )
    if parts:
        more = " and others" if len(parts) > 1 else ""
        notes.append(
            f"the example inputs reach only a part of {parts[0]!r}{more}: the rest stays fixed; inputs that reach all "
            "of it (the longest, the most steps) show what may be permuted there"
        )
    if mixed:
        notes.append(
            f"{' and '.join(mixed[:2])} share memory and are different views of it: their units stay; give each tensor "
            "memory of its own (.clone()), or use one parameter in both places"
        )
    if exported.more_ways:
        notes.append(
            "the way through forward depends on the data, and not every way was followed; prove the spec with inputs "
            "that go elsewhere as well: check_spec(model, spec, inputs)"
        )
    notes += [
        f"{note_on(copy)}{original!r} that training does not reach; if something outside of forward "
        f"makes the one from the other, spec.tie({{{copy!r}: {original!r}}}) moves them alike"
        for copy, original in exported.followers.items()
    ]
    return PermutationSpec(
        axes=axes,
        buffers=tuple(name for name in state if name not in exported.parameters),
        uses=walk.uses,
        notes=tuple(notes),
        inputs=exported.inputs,
        training=exported.training,
    )
