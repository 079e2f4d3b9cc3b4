"""Which of Flower's mods stand before and behind another one in the list of mods.

A mod is not shown its list. What is behind it can be read off the closure of ``call_next``, and what is before it has a
frame on the stack: both are looked at only for the names of Flower's own mods, so that an unknown form hides a mod
but breaks nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

PRIVACY = ("fixedclipping_mod", "adaptiveclipping_mod", "LocalDpMod")
SECURE = ("secagg_mod", "secaggplus_mod")


def mods_behind(call_next: Any) -> Iterator[str]:
    """Name the mods between this one and the app, the next one first.

    Examples
    --------
    >>> from flwr.client.mod import make_ffn
    >>> from flwr.clientapp.mod import fixedclipping_mod, message_size_mod
    >>> app = lambda message, context: message
    >>> list(mods_behind(make_ffn(app, [message_size_mod, fixedclipping_mod])))
    ['message_size_mod', 'fixedclipping_mod']
    """
    while True:
        code, cells = getattr(call_next, "__code__", None), getattr(call_next, "__closure__", None)
        held = {} if code is None or cells is None else dict(zip(code.co_freevars, cells, strict=True))
        if not {"_mod", "_ffn"} <= held.keys():
            return
        mod, call_next = held["_mod"].cell_contents, held["_ffn"].cell_contents
        yield getattr(mod, "__name__", type(mod).__name__)


def flowers_mods_before() -> list[str]:
    """Name Flower's privacy and secure aggregation mods among the callers, the nearest first.

    Examples
    --------
    >>> flowers_mods_before()
    []
    """
    found, frame = [], sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "__call__":
            name = type(frame.f_locals.get("self")).__name__
        if name in (*PRIVACY, *SECURE) and str(frame.f_globals.get("__name__", "")).startswith("flwr."):
            found.append(name)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return found
