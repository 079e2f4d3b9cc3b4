"""A spec as text: what ``print(spec)`` shows."""

from __future__ import annotations

from collections.abc import Sequence

from fedrebasin.layout import Fixed, Free, leaves
from fedrebasin.layout_text import describe
from fedrebasin.ties import Axes, log10_order, perm_shapes, tied_axes


def as_text(axes: Axes, *, notes: Sequence[str] = (), checked: bool = False) -> str:
    """Permutations with their axes, composed axes, what is fixed and why, notes.

    >>> print(as_text({"w": (Free("a", 3), Fixed(2, "input")), "b": (Free("a", 3),)}, checked=True))
    1 perms, log10 of the number of permutations 0.8
      a (3): w:0, b:0
    fixed:
      input: w:1
    checked: yes
    """
    shapes, tied = perm_shapes(axes), tied_axes(axes)
    lines = [f"{len(shapes)} perms, log10 of the number of permutations {log10_order(axes):,.1f}"]
    for perm, shape in shapes.items():
        moved = ", ".join(f"{axis.name}:{axis.dim}" for axis in tied[perm])
        size = f"{shape[0]} x {shape[1]}" if len(shape) == 2 else str(shape[0])
        lines.append(f"  {perm} ({size}): {moved}")
    composed = [
        f"  {name}:{dim} = {describe(layout)}"
        for name, layouts in axes.items()
        for dim, layout in enumerate(layouts)
        if not isinstance(layout, Free | Fixed)
    ]
    if composed:
        lines += ["composed axes:", *composed]
    reasons: dict[str, list[str]] = {}
    for name, layouts in axes.items():
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
    lines += [f"note: {note}" for note in notes]
    lines.append("checked: yes" if checked else "checked: no (check_spec proves it)")
    return "\n".join(lines)
