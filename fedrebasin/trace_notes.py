"""What a trace has to say beside the spec: ops without a rule, and what stays fixed although it need not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedrebasin.axes.node import ITSELF, OVER_TWICE, TWICE
from fedrebasin.copies import note_on
from fedrebasin.export import Exported
from fedrebasin.layout import Fixed, Layout, leaves
from fedrebasin.walk import Walk


def trace_notes(
    exported: Exported,
    walk: Walk,
    axes: Mapping[str, tuple[Layout, ...]],
    parts: Sequence[str],
    views: Sequence[str],
) -> Iterator[str]:
    """Notes on a trace, one sentence each.

    Parameters
    ----------
    exported : Exported
    walk : Walk
        That is over.
    axes : dict of str to tuple of Layout
        Of the spec.
    parts, views : list of str
        Tensors that the example inputs reach a part of, and those that share memory with another.
    """
    for op, where in walk.fixed_ops.items():
        yield f"no rule for {op} (first in {where or 'the model'}): its axes stay fixed"
    looped = [name for name, layouts in axes.items() if any(map(_is_tied_to_itself, layouts))]
    if looped:
        more, user = f" and {len(looped) - 1} more" * (len(looped) > 1), walk.uses.get(looped[0], "nothing else")
        yield (
            f"an axis is tied to a part of itself, or is twice in one axis, in {looped[0]!r}{more} (used by {user}): "
            "what would have to move in two ways at once stays fixed"
        )
    if exported.failure and exported.differs:
        yield (
            "forward gives something else in training mode, and cannot be exported there "
            f"({exported.failure}): further training may see permuted what is none of evaluation's outputs; fix its "
            "axes by spec.fix, or let forward give the same in both modes"
        )
    elif exported.failure:
        yield (
            "some parameters, or buffers that training writes, are not used in evaluation mode, and the model cannot "
            f"be exported in training mode ({exported.failure}): they stay fixed, and further training may see them "
            "beside permuted units"
        )
    elif exported.unused:
        yield (
            f"forward uses {_first(exported.unused)} neither in evaluation nor in training mode: they stay fixed, "
            "and what uses them elsewhere (a training step) may see them beside permuted units; let forward use them, "
            "too, in a module with the same state dict, or fix what they read by spec.fix"
        )
    if parts:
        yield (
            f"the example inputs reach only a part of {_first(parts)}: the rest stays fixed; inputs that reach all "
            "of it (the longest, the most steps) show what may be permuted there"
        )
    if views:
        yield (
            f"{' and '.join(views[:2])} share memory and are different views of it: their units stay; give each tensor "
            "memory of its own (.clone()), or use one parameter in both places"
        )
    if exported.more_ways:
        yield (
            "the way through forward depends on the data, and not every way was followed; prove the spec with inputs "
            "that go elsewhere as well: check_spec(model, spec, inputs)"
        )
    for copy, original in exported.followers.items():
        yield (
            f"{note_on(copy)}{original!r} that training does not reach; if something outside of forward "
            f"makes the one from the other, spec.tie({{{copy!r}: {original!r}}}) moves them alike"
        )


def _is_tied_to_itself(layout: Layout) -> bool:
    reasons = {reason for end in leaves(layout) if isinstance(end, Fixed) for reason in end.reason.split("; ")}
    return not reasons.isdisjoint((ITSELF, TWICE, OVER_TWICE))


def _first(names: Sequence[str]) -> str:
    return f"{names[0]!r}{' and others' * (len(names) > 1)}"
