"""A spec as text: what ``print(spec)`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrebasin.layout import Fixed, Free, leaves
from fedrebasin.layout_text import describe

if TYPE_CHECKING:
    from fedrebasin.spec import PermutationSpec


def as_text(spec: PermutationSpec) -> str:
    """Permutations with their axes, composed axes, what is fixed and why, notes."""
    lines = [f"{len(spec.perm_shapes)} perms, log10 of the number of permutations {spec.log10_order:,.1f}"]
    for perm, shape in spec.perm_shapes.items():
        axes = ", ".join(f"{axis.name}:{axis.dim}" for axis in spec.tied[perm])
        size = f"{shape[0]} x {shape[1]}" if len(shape) == 2 else str(shape[0])
        lines.append(f"  {perm} ({size}): {axes}")
    composed = [
        f"  {name}:{dim} = {describe(layout)}"
        for name, layouts in spec.axes.items()
        for dim, layout in enumerate(layouts)
        if not isinstance(layout, Free | Fixed)
    ]
    if composed:
        lines += ["composed axes:", *composed]
    reasons: dict[str, list[str]] = {}
    for name, layouts in spec.axes.items():
        for dim, layout in enumerate(layouts):
            for leaf in leaves(layout):
                if isinstance(leaf, Fixed) and leaf.size > 1:
                    reasons.setdefault(leaf.reason or "fixed", []).append(f"{name}:{dim}")
    if reasons:
        lines.append("fixed:")
    for reason, places in reasons.items():
        shown = list(dict.fromkeys(places))
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        lines.append(f"  {reason}: {', '.join(shown[:4])}{more}")
    lines += [f"note: {note}" for note in spec.notes]
    lines.append("checked: yes" if spec.checked else "checked: no (check_spec proves it)")
    return "\n".join(lines)
