"""One point of a sweep: two trained ends at one value and seed, merged in the middle, and the losses between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedrebasin import permute
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.disjoint_bench import Bench, Effort, State
from fedrebasin.simulations.disjoint_seed import baselines, middle
from fedrebasin.simulations.ends import EndConfig


def measure_point(
    data: Dataset,
    states: Mapping[str, State],
    rows: Mapping[str, Tensor],
    *,
    end: EndConfig,
    effort: Effort,
    device: torch.device,
) -> dict[str, Any]:
    """Match B to A, and measure ends, baselines, merges, and the path without correction.

    Parameters
    ----------
    states, rows : mapping
        State dict and training rows of ``"a"`` and ``"b"``, and of ``"all"`` where there is such a model.

    Returns
    -------
    dict
        ``rows`` and ``curves`` (``plain`` and ``aligned``) as of the disjoint experiment, ``matching``, ``seconds``.
    """
    bench = Bench(data, end, effort, device)
    matching = bench.match(states["a"], states["b"], end.seed)
    started = time.perf_counter()
    a = bench.place(states["a"])
    others = {
        "plain": bench.place(states["b"]),
        "aligned": bench.place(permute(bench.spec, matching.perms, states["b"])),
    }
    logits = baselines(bench, states, rows)
    for path, other in others.items():
        logits |= middle(bench, path, a, other)
    return {
        "rows": {name: bench.measure(one) for name, one in logits.items()},
        "curves": {path: bench.curve(a, other, "") for path, other in others.items()},
        "matching": {
            "moved-fraction": matching.moved_fraction,
            "objective": matching.objective,
            "objective-before": matching.objective_before,
        },
        "seconds": {"matching": matching.seconds, "measuring": time.perf_counter() - started},
    }
