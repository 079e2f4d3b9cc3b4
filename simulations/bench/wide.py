"""Wide layers, and many clients: ``python -m fedrebasin.simulations.bench.wide --output FILE``.

Wide: one hidden layer is matched (``weight_matching``) and, in the same run, its similarity is solved once by scipy
from cold; 11,008 is the width of the MLP of a language model of 7 billion parameters (gate, up and down). The solver
is exact at every width, so that the gap to the optimum is zero. Peak memory is the process's, and that of the two
models alone is beside it; each width is measured in a process of its own.

Clients: N models against one reference, near it (as after some local steps) and far (trained apart), by
``match_each`` and by a loop over ``weight_matching``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fedrebasin import PermutationSpec, match_each, trace, weight_matching
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.simulations.bench.matching import NETWORKS, pair
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.merge_memory import peak
from fedrebasin.simulations.results import provenance, save_results

State = dict[str, Tensor]


class GatedMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, stream: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(stream, width, bias=False), nn.Linear(stream, width, bias=False)
        self.down = nn.Linear(width, stream, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, stream)`` to the same."""
        result: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return result


#: name: stream, width
WIDE = {"784-4096-784": (784, 4096), "4096-11008-4096": (4096, 11008)}


def wide_pair(name: str) -> tuple[PermutationSpec, State, State]:
    """Two independent random initialisations."""
    stream, width = WIDE[name]
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = GatedMlp(stream, width)
        states.append({key: tensor.detach() for key, tensor in net.state_dict().items()})
    return trace(net, (torch.zeros(1, stream),)), states[0], states[1]


def measure_wide(name: str) -> dict[str, Any]:
    """Seconds of matching and of one cold solve, and peak memory of this process after matching."""
    spec, first, second = wide_pair(name)
    before = peak()
    found = weight_matching(spec, first, second)
    highest = peak()
    problem = WeightProblem(spec, first, second)
    similarity = problem.similarity(problem.blocks[0]).numpy()
    started = time.perf_counter()
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    cold = time.perf_counter() - started
    identity = float(similarity.trace())
    return {
        "network": name,
        "parameters": sum(tensor.numel() for tensor in first.values()),
        "seconds": round(found.seconds, 2),
        "cold-scipy-seconds": round(cold, 2),
        "ratio": round(found.seconds / cold, 2),
        "gain": found.objective - found.objective_before,
        "optimal-gain": float(similarity[rows, columns].sum()) - identity,
        "peak-gib": round(highest / 2**30, 2),
        "peak-gib-before": round(before / 2**30, 2),
    }


def measure_clients(name: str, kind: str, clients: int, runs: int) -> dict[str, Any]:
    """Medians of interleaved runs over N clients."""
    spec, first, _ = pair(name, "independent", 0)
    make = NETWORKS[name][0]
    models: list[State] = []
    for seed in range(clients):
        torch.manual_seed(100 + seed)
        if kind == "near":
            models.append({key: _nudged(tensor) for key, tensor in first.items()})
        else:
            models.append({key: tensor.detach() for key, tensor in make().state_dict().items()})
    together, alone = [], []
    for _ in range(runs):
        started = time.perf_counter()
        found = match_each(spec, first, models)
        together.append(time.perf_counter() - started)
        started = time.perf_counter()
        loop = [weight_matching(spec, first, model) for model in models]
        alone.append(time.perf_counter() - started)
    same = all(bool((a.perms[k] == b.perms[k]).all()) for a, b in zip(found, loop, strict=True) for k in a.perms)
    each, single = statistics.median(together), statistics.median(alone)
    return {
        "network": name,
        "clients": clients,
        "kind": kind,
        "seconds-per-client": round(each / clients, 4),
        "loop-seconds-per-client": round(single / clients, 4),
        "ratio": round(single / each, 2),
        "same-perms": same,
        "moved-fraction": statistics.mean(one.moved_fraction for one in found),
    }


def _nudged(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return tensor
    return tensor + 0.05 * tensor.std() * torch.randn_like(tensor)


def main() -> None:
    """Measure wide layers, each in a process of its own, and then clients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--wide", default=",".join(WIDE))
    parser.add_argument("--clients", default="mlp 3x512,resnet20 x4")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_wide(options.one)))
        return
    started = time.time()
    wide, clients = [], []
    for name in filter(None, options.wide.split(",")):
        call = [sys.executable, "-m", "fedrebasin.simulations.bench.wide", "--one", name]
        wide.append(json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout))
        print(json.dumps(wide[-1]), flush=True)
    for name in filter(None, options.clients.split(",")):
        for kind, count in (("near", 10), ("apart", 5)):
            clients.append(measure_clients(name, kind, count, options.runs))
            print(json.dumps(clients[-1]), flush=True)
    if options.output:
        result = {"experiment": "matching-wide", "threads": torch.get_num_threads(), "wide": wide, "clients": clients}
        save_results(options.output, {**result, "provenance": provenance(bench_command("wide"), [0], started)})


if __name__ == "__main__":
    main()
