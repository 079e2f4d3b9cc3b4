"""Git Re-Basin's Algorithm 3 as one would write it down: the honest baseline of the benchmark of many models.

float32, models and permutations in random order, scipy's assignments, until a whole pass moves nothing. The mean of
the others is taken once for each model, its unfolds once for each of its passes; no state dict is copied. Networks as
in ``plain.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin import PermutationSpec, compose, identity_perms, permute
from fedrebasin.simulations.bench.plain import plain_weight_matching


@dataclass(frozen=True)
class PlainMany:
    """One permutation dict a model, seconds, and passes over all models."""

    perms: list[dict[str, Tensor]]
    seconds: float
    passes: int


def plain_merge_many(
    spec: PermutationSpec, models: Sequence[Mapping[str, Tensor]], *, seed: int = 0, passes: int = 100
) -> PlainMany:
    """Align each model, as it is by now, to the mean of the others by the plain Algorithm 1, until none moves."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    perms = [identity_perms(spec) for _ in models]
    current = [dict(model) for model in models]
    done, moved = 0, True
    while moved and done < passes:
        moved, done = False, done + 1
        for place in torch.randperm(len(models), generator=generator).tolist():
            others = [state for other, state in enumerate(current) if other != place]
            mean = {name: torch.stack([state[name] for state in others]).float().mean(0) for name in others[0]}
            found = plain_weight_matching(spec, mean, current[place], seed=seed + done).perms
            if any(bool((perm != torch.arange(len(perm))).any()) for perm in found.values()):
                moved = True
                perms[place] = compose(spec, perms[place], found)
                current[place] = permute(spec, found, current[place])
    return PlainMany(perms, time.perf_counter() - started, done)
