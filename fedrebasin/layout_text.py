"""Layouts and specs as JSON, and layouts as one short line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedrebasin.errors import RebasinError
from fedrebasin.layout import Each, Fixed, Free, Layout, Product, Sum


def to_json(layout: Layout) -> dict[str, Any]:
    """A layout as plain JSON types; the inverse of :func:`from_json`.

    >>> to_json(Free("fc1", 512))
    {'perm': 'fc1', 'size': 512}
    """
    match layout:
        case Free():
            return {"perm": layout.perm, "size": layout.size} | ({"over": layout.over} if layout.over else {})
        case Fixed():
            return {"fixed": layout.reason, "size": layout.size} | ({"name": layout.name} if layout.name else {})
        case Sum():
            return {"sum": [to_json(part) for part in layout.parts]}
        case Product():
            return {"product": [to_json(factor) for factor in layout.factors]}
        case Each():
            return {"each": layout.over, "parts": [to_json(part) for part in layout.parts]}


def from_json(data: Any) -> Layout:
    """A layout from plain JSON types.

    Raises
    ------
    RebasinError
        If ``data`` is not a layout.

    Examples
    --------
    >>> from_json({"sum": [{"perm": "a", "size": 2}, {"fixed": "input", "size": 3}]}).size
    5
    """
    match data:
        case {"perm": str(perm), "size": int(size)} if size > 0:
            return Free(perm, size, str(data.get("over", "")))
        case {"fixed": str(reason), "size": int(size)} if size >= 0:
            return Fixed(size, reason, str(data.get("name", "")))
        case {"sum": [*parts]}:
            return Sum(tuple(from_json(part) for part in parts))
        case {"product": [*factors]}:
            return Product(tuple(from_json(factor) for factor in factors))
        case {"each": str(over), "parts": [_, *_] as parts}:
            return Each(over, tuple(from_json(part) for part in parts))
    raise RebasinError(f"spec: expected a layout with perm, fixed, sum, product or each; got {str(data)[:80]}")


def digest(axes: Mapping[str, tuple[Layout, ...]], buffers: tuple[str, ...]) -> str:
    """By which a hand edit of a spec's axes is seen."""
    listed = {name: [to_json(layout) for layout in layouts] for name, layouts in axes.items()}
    return hashlib.sha256(json.dumps([listed, list(buffers)], sort_keys=True).encode()).hexdigest()


#: The type of a spec's field, and of what is in it.
_FIELDS: dict[str, tuple[type, type]] = {
    "axes": (dict, list),
    "buffers": (list, str),
    "uses": (dict, str),
    "notes": (list, str),
    "whole": (list, str),
    "inputs": (int, int),
}


def check_fields(data: Mapping[str, Any]) -> None:
    """Raise :class:`RebasinError` unless the fields of a spec's JSON are of their types; those not there are.

    >>> check_fields({"axes": {"w": []}, "buffers": ["w"]})
    """
    for name, (kind, inner) in _FIELDS.items():
        value = data.get(name, kind())
        inside = () if not isinstance(value, dict | list) else value.values() if isinstance(value, dict) else value
        if not isinstance(value, kind) or not all(isinstance(one, inner) for one in inside):
            what = kind.__name__ if kind is inner else f"{kind.__name__} of {inner.__name__}"
            raise RebasinError(f"spec: expected {name!r} as {what}; got {str(value)[:80]}")


def describe(layout: Layout) -> str:
    """A layout in one short line.

    >>> describe(Product((Free("conv5", 512), Fixed(49, "spatial"))))
    'conv5[512] x 49'
    """
    match layout:
        case Free():
            return f"{layout.perm}[{layout.size}]" + (f" in each of {layout.over}" if layout.over else "")
        case Fixed():
            return str(layout.size)
        case Sum():
            return " + ".join(describe(part) for part in layout.parts)
        case Each():
            return f"[{' | '.join(describe(part) for part in layout.parts)}] by {layout.over}"
        case Product():
            return " x ".join(
                f"({describe(factor)})" if isinstance(factor, Sum) else describe(factor) for factor in layout.factors
            )
