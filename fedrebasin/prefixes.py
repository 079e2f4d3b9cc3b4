"""Wrappers of a module put a prefix before the names of all of its tensors."""

from __future__ import annotations

from collections.abc import Collection

WRAPPERS = {"_orig_mod": "torch.compile", "module": "DataParallel"}


def common_prefix(long: Collection[str], short: Collection[str]) -> str:
    """Return the prefix that every name of ``long`` has before a name of ``short``, "" if there is none.

    Examples
    --------
    >>> common_prefix(["module.a", "module.b"], ["a", "b"]), common_prefix(["module.a", "b"], ["a", "b"])
    ('module.', '')
    """
    if not long or not short:
        return ""
    first = next(iter(long))
    ends = [name for name in short if first.endswith(name) and first != name]
    prefixes = [first[: -len(name)] for name in ends]
    return next((prefix for prefix in prefixes if {prefix + name for name in short} == set(long)), "")


def wrappers_of(prefix: str) -> str:
    """Say in brackets which wrappers a prefix is of.

    Examples
    --------
    >>> wrappers_of("_orig_mod.module."), wrappers_of("submodule.")
    (' (torch.compile, DataParallel)', '')
    """
    names = [wrapper for name, wrapper in WRAPPERS.items() if name in prefix.split(".")]
    return f" ({', '.join(names)})" if names else ""
