"""How much memory a merge needs, and whether it holds its models or reads them tensor by tensor."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fedrebasin.errors import UsageError
from fedrebasin.matching.plan import plan_of
from fedrebasin.matching.relaxed import no_logits
from fedrebasin.spec import PermutationSpec
from fedrebasin.stored import StoredState

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**k for k, p in enumerate("KMGT", 1)}
#: copies of one tensor that a product of two holds at its peak: both, parts and orders of them, their unfoldings
_COPIES = 7
#: copies of a similarity: itself, what is kept of it, and the solver's two in float64 with a float32 one
_SIMILARITIES = 7
#: copies of all tensors that the projections of heads and groups hold together
_FAMILY = 5
#: copies of a model's relaxed permutations: where they are, were and go to, points between, gradients, scores
_RELAXED = 6
#: what the proof of a spec holds for each parameter: the network's own float32, three float64
_PROOF = 28
#: buffers, and what the allocator does not give back
_MARGIN = 48_000_000
#: what Python holds with torch loaded, where the system does not say
_UNKNOWN = 600_000_000


def parse_memory(text: str) -> int | None:
    """Bytes; ``None`` for an empty text.

    >>> parse_memory("2GB"), parse_memory("1.5 GiB"), parse_memory("")
    (2000000000, 1610612736, None)
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"--memory: expected a size such as 2GB or 512MiB; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size_text(size: float) -> str:
    """Bytes for people, rounded up.

    >>> size_text(1_234_567_890), size_text(3_000), size_text(0)
    ('1.24 GB', '1 MB', '0 MB')
    """
    if size >= 1e9:
        return f"{-(-size // 1e7) / 100:.2f} GB"
    return f"{math.ceil(size / 1e6)} MB"


@dataclass(frozen=True)
class Needs:
    """Bytes of memory at the peak, estimated from above: with the models held, and read tensor by tensor.

    The allocator is taken to keep nothing that was freed, as under a limit. ``streamed`` is None where what is asked
    for cannot do with it; ``why`` says what.
    """

    held: int
    streamed: int | None
    why: str = ""


def needs_of(
    spec: PermutationSpec,
    states: Sequence[StoredState],
    *,
    whole: str = "",
    copies: int = 0,
    relaxed: int = 0,
    base: int | None = None,
) -> Needs:
    """Estimate the peak.

    Parameters
    ----------
    spec : PermutationSpec
    states : sequence of StoredState
    whole : str
        What needs the models as a whole, for messages; "" if nothing does.
    copies : int
        How many float32 copies of a model that takes besides the models.
    relaxed : int
        For how many models it takes relaxed permutations.
    base : int, optional
        What the process holds before; by default what it holds now.
    """
    base = resident() if base is None else base
    plan = plan_of(spec)
    entries = {name: entry.numel for name, entry in states[0].entries.items()}
    wide = {name: any(state.entries[name].dtype.itemsize > 4 for state in states) for name in entries}
    sizes = {name: entries[name] * (8 if wide[name] else 4) for name in entries}
    families = [
        _FAMILY * sum({name: sizes[name] for block in group for name in plan.tensors[block]}.values())
        for group in plan.clusters.values()
        if len(group) > 1
    ]
    units = [block.size for block in plan.blocks]
    step = max([_COPIES * max(sizes.values(), default=0), *families])
    streamed = base + _MARGIN + step + _SIMILARITIES * 4 * max(units, default=0) ** 2
    one = sum(sizes.values())
    held = streamed + sum(state.nbytes for state in states) + 8 * sum(size**2 for size in units)
    # narrow tensors are cast: those of the pair that is matched, and of all models where they are looked at together
    narrow = any(
        entry.numel * entry.dtype.itemsize < sizes[name] for state in states for name, entry in state.entries.items()
    )
    held += (copies + ((2 + len(states) if whole else 2) if narrow else 0)) * one
    matrices = no_logits(spec, torch.empty((), device="meta")).values() if relaxed else ()
    entry_size = 8 if any(wide[name] for name in plan.names) else 4
    held += relaxed * _RELAXED * entry_size * sum(matrix.numel() for matrix in matrices)
    return Needs(held, None if whole else streamed, whole)


def streams(limit: int | None, needs: Needs) -> bool:
    """Whether the merge reads its models tensor by tensor, because they do not fit.

    Raises
    ------
    UsageError
        If what is asked for does not fit into the limit in any way; the message names the figure that would do.
    """
    if limit is None or needs.held <= limit:
        return False
    if needs.streamed is not None and needs.streamed <= limit:
        return True
    if needs.streamed is None:
        raise UsageError(
            f"--memory: {needs.why} needs the models as a whole, about {size_text(needs.held)}; got "
            f"{size_text(limit)}. Merge with --matching weight, a --reference and no --correction, or give more"
        )
    raise UsageError(
        f"--memory: the largest tensors and permutations need about {size_text(needs.streamed)}; got {size_text(limit)}"
    )


def check_proof(limit: int | None, states: Sequence[StoredState]) -> None:
    """Refuse to prove a spec where the proof, which computes with the whole network, does not fit."""
    need = resident() + _PROOF * sum(entry.numel for entry in states[0].entries.values())
    if limit is not None and need > limit:
        raise UsageError(
            f"--memory: the proof of the traced spec needs about {size_text(need)}; got {size_text(limit)}. Give a "
            "proved one with --spec (fedrebasin inspect MODULE:NET --input SHAPE --save spec.json), or --no-check"
        )


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak() or _UNKNOWN


def peak() -> int:
    """The most bytes of memory that this process ever held; 0 where no module tells (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
