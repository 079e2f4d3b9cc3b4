"""Many models without a reference: ``python -m fedrebasin.simulations.bench.many --output FILE``.

Independent random initialisations (He's normal, biases zero) are matched by every data-free method of ``match_many``,
by a plain Algorithm 3 (``plain_many.py``), and by merge-many's ascent from other starts. The gain is that of the sum
over pairs of the inner product of the aligned weights, unweighted, over the models as they are. Seconds are those of
the processor, summed over threads, medians over the runs, in one process: on a machine that others use they say more
than those of the clock, which are beside them. Every run has initialisations of its own, and what is slow takes part in
the first only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin import ManyMatching, PermutationSpec, match_many, permute, trace
from fedrebasin.matching.many_problem import ManyProblem
from fedrebasin.matching.merge_many import ascend
from fedrebasin.matching.star import star
from fedrebasin.simulations.bench.matching import NETWORKS
from fedrebasin.simulations.bench.plain_many import plain_merge_many
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.results import provenance, save_results

State = dict[str, Tensor]
METHODS = ("merge-many", "cycle-consistent", "straight-through-many", "star", "medoid")


def models_of(name: str, count: int, seed: int) -> tuple[PermutationSpec, list[State]]:
    """A network's spec, and independent initialisations."""
    make, batch = NETWORKS[name]
    net = make()
    generator = torch.Generator().manual_seed(seed)

    def draw(key: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return torch.ones_like(tensor) if key.endswith("weight") else torch.zeros_like(tensor)
        drawn: Tensor = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
        return drawn

    states = [{key: draw(key, tensor.detach()) for key, tensor in net.state_dict().items()} for _ in range(count)]
    return trace(net, (batch,)), states


def gain_of(spec: PermutationSpec, models: list[State], perms: list[State]) -> float:
    """What permuting adds to the unweighted sum over pairs."""

    def total(states: list[State]) -> float:
        names = {axis.name for axes in spec.tied.values() for axis in axes} - set(spec.buffers)
        stacks = (torch.stack([state[name].double() for state in states]) for name in names)
        return sum(float(stack.sum(0).square().sum() - stack.square().sum()) / 2 for stack in stacks)

    return total([permute(spec, own, model) for own, model in zip(perms, models, strict=True)]) - total(models)


def _joint(method: str) -> Callable[[PermutationSpec, list[State]], list[State]]:
    def run(spec: PermutationSpec, models: list[State]) -> list[State]:
        found: ManyMatching = match_many(spec, models, method=method)
        return found.perms

    return run


def _plain(spec: PermutationSpec, models: list[State]) -> list[State]:
    return plain_merge_many(spec, models).perms


def _ascent_from_identity(spec: PermutationSpec, models: list[State]) -> list[State]:
    problem = ManyProblem(spec, models, [1 / len(models)] * len(models))
    ascend(problem, before=problem.objective())
    return problem.perms


def _ascent_from_star(spec: PermutationSpec, models: list[State]) -> list[State]:
    problem = ManyProblem(spec, models, [1 / len(models)] * len(models))
    before = star(problem)[0]
    ascend(problem, before=before)
    return problem.perms


SLOW = ("plain Algorithm 3", "cycle-consistent")
WAYS = {
    "plain Algorithm 3": _plain,
    **{method: _joint(method) for method in METHODS},
    "ascent from the identity": _ascent_from_identity,
    "ascent from a star": _ascent_from_star,
}


def measure(name: str, count: int, ways: list[str], runs: int) -> list[dict[str, Any]]:
    """Gains and median seconds of several ways on the same models, in turn."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    clock: dict[str, list[float]] = {way: [] for way in ways}
    gains: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs):
        spec, models = models_of(name, count, run)
        for way in ways:
            if run and way in SLOW:
                continue
            started, used = time.perf_counter(), time.process_time()
            perms = WAYS[way](spec, models)
            seconds[way].append(round(time.process_time() - used, 3))
            clock[way].append(round(time.perf_counter() - started, 3))
            gains[way].append(round(gain_of(spec, models, perms), 1))
            print(name, count, way, gains[way][-1], seconds[way][-1], flush=True)
    return [
        {
            "network": name,
            "models": count,
            "method": way,
            "gain": gains[way],
            "seconds": statistics.median(seconds[way]),
            "all-seconds": seconds[way],
            "clock-seconds": clock[way],
        }
        for way in ways
    ]


def main() -> None:
    """Measure every way on five models, and merge-many's time for 2, 5, 10 and 20."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--networks", default="mlp 3x512,resnet20 x4")
    parser.add_argument("--methods", default=",".join(WAYS))
    parser.add_argument("--counts", default="2,5,10,20", help="how many models, for merge-many alone")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    started, rows, growth = time.time(), [], []
    for name in options.networks.split(","):
        rows += measure(name, 5, options.methods.split(","), options.runs)
        for count in map(int, filter(None, options.counts.split(","))):
            growth += measure(name, count, ["merge-many"], 1)
    if options.output:
        result = {
            "experiment": "many",
            "threads": torch.get_num_threads(),
            "load-average": os.getloadavg()[0],
            "rows": rows,
            "growth": growth,
        }
        seeds = list(range(options.runs))
        save_results(options.output, {**result, "provenance": provenance(bench_command("many"), seeds, started)})


if __name__ == "__main__":
    main()
