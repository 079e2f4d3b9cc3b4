"""What the C library's allocator holds of memory that nobody uses any more."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Models smaller than this leave little, and giving that back takes some milliseconds.
_WORTHWHILE = 1 << 23
_M_MMAP_THRESHOLD = -3  # of malloc.h
#: What ctypes raises where there is another C library: it lacks the function, or (Windows) has no name None.
_NOT_GLIBC = (OSError, AttributeError, TypeError)


def return_freed_memory(size: int) -> None:
    """Let glibc give the system what was freed after work on a model of ``size`` bytes; elsewhere, do nothing.

    It keeps freed tensors of up to 32 MB and puts new ones beside them: ten models of 45 MB that were matched and
    rewritten one after the other left 100 MB to 400 MB.

    Examples
    --------
    >>> return_freed_memory(100_000_000)
    """
    if size < _WORTHWHILE:
        return
    with suppress(*_NOT_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


def size_of(model: Mapping[str, Tensor]) -> int:
    """The bytes of a model's tensors.

    >>> import torch
    >>> size_of({"w": torch.zeros(2, 3)})
    24
    """
    return sum(tensor.nbytes for tensor in model.values())


def keep_nothing_freed() -> None:
    """Let the allocator give back every tensor of a megabyte and more as soon as it is dropped, from now on.

    glibc otherwise keeps what was freed below 32 MB, in pieces: with layers of 10 MB that was a gigabyte.
    """
    with suppress(*_NOT_GLIBC):  # its allocator is left alone
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
