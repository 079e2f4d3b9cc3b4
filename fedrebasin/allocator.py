"""What the C library's allocator holds of memory that nobody uses any more."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Models smaller than this leave little, and giving that back takes some milliseconds.
_WORTHWHILE = 1 << 23


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
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
