"""Several replies at once: each on a thread of its own, with its part of the cores.

A matching is many small products and assignments, which several cores speed up little (two: by a fifth, for twice the
processor time); two replies on a core each take half of the time. So the threads that torch may use are parted among
the replies that are looked at together, and never more are run than that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from fedrebasin.errors import UsageError

#: Replies at once where nothing else is said: each holds some 20 MB and its similarities while it is matched.
MOST = 4
#: Replies that are compared with the sent model in one go.
GROUP = 8

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Workers:
    """How many replies are looked at together.

    Parameters
    ----------
    at_once : int, optional
        At most so many; by default ``MOST``, and one on an accelerator, whose memory they would share. Never more
        than the threads that torch may use (``torch.set_num_threads``, ``OMP_NUM_THREADS``) or this process's cores.
    device : torch.device, optional

    Raises
    ------
    UsageError
        If ``at_once`` is not a whole number from 1.

    Examples
    --------
    >>> Workers(1).map(len, ["a", "bc"])
    [1, 2]
    """

    at_once: int | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if self.at_once is not None and (
            isinstance(self.at_once, bool) or not isinstance(self.at_once, int) or self.at_once < 1
        ):
            raise UsageError(f"replies_at_once: expected a whole number from 1, or None; got {self.at_once!r}")

    @property
    def most(self) -> int:
        """The limit, as it is given or by default."""
        if self.at_once is not None:
            return self.at_once
        return MOST if self.device is None or self.device.type == "cpu" else 1

    def map(self, function: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
        """Call a function for each item, at most so many at once; the results in the items' order.

        The caller's thread is one of the workers: the allocator keeps some of what each further thread frees.
        What it raises is raised here, that of the first item in order; what has not begun by then never does.
        """
        waiting, threads = list(items), _threads()
        count = min(self.most, threads, len(waiting))
        if count < 2:
            return [function(item) for item in waiting]
        with (
            _kept_threads(),
            ThreadPoolExecutor(count - 1, "rebasin", torch.set_num_threads, (threads // count,)) as pool,
        ):
            others = [pool.submit(function, item) for item in waiting]
            torch.set_num_threads(threads // count)
            own: dict[int, Found] = {}
            try:
                for place, other in enumerate(others):
                    if not other.cancel():  # another thread has begun it
                        continue
                    try:
                        own[place] = function(waiting[place])
                    except Exception:
                        pool.shutdown(wait=False, cancel_futures=True)
                        for earlier in sorted(set(range(place)).difference(own)):
                            others[earlier].result()
                        raise
                return [own[place] if place in own else other.result() for place, other in enumerate(others)]
            finally:
                del other, others  # a future holds what it raised, and that this frame and its callers

    def groups(self, items: Sequence[Item]) -> list[list[Item]]:
        """Items in groups of at most ``GROUP``, as many groups for each worker, for what costs less together.

        >>> Workers(1).groups(range(10))
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        """
        workers = max(1, min(self.most, _threads(), len(items)))
        count = workers * -(-len(items) // (workers * GROUP))
        return [list(items[len(items) * part // count : len(items) * (part + 1) // count]) for part in range(count)]


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> int:
    return min(torch.get_num_threads(), cores())


@contextmanager
def _kept_threads() -> Iterator[None]:
    """Put torch's count of threads back.

    With OpenMP (the builds of Linux, Windows and macOS) ``set_num_threads`` holds for the thread that calls it, and
    for those that begin after it.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
