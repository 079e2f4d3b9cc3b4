"""Signals that end a run: as an exception, or as a call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came; ``status`` is the exit status that says so."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within it, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`, so that whatever was begun is cleared away."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with on_signals(interrupt):
        yield


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Within it, SIGINT, SIGTERM and SIGHUP call ``handler``; afterwards what they called before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; whoever runs this in another takes care of signals
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
