"""Data-free matching methods side by side: ``python -m fedrebasin.simulations.bench.methods --output FILE``.

Each method matches the same pairs; ``gain`` is the objective above the identity's (what the inner product of the
weights gained), one number a pair, and ``seconds`` the median over pairs and runs, in one process. A pair is two
networks that started apart: trained on scikit-learn's digits, or as they were initialised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import (
    Matching,
    PermutationSpec,
    frank_wolfe_matching,
    sinkhorn_matching,
    trace,
    weight_matching,
)
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.training import RECIPES, train

State = dict[str, Tensor]
Match = Callable[[PermutationSpec, State, State], Matching]

#: name: the network for a seed, whether it is trained on digits, an example batch
NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool, Tensor]] = {
    "mlp 3x64, trained": (lambda: build_model("mlp", (1, 8, 8), 10, width=64), True, torch.zeros(2, 1, 8, 8)),
    "mlp 3x64": (lambda: build_model("mlp", (1, 8, 8), 10, width=64), False, torch.zeros(2, 1, 8, 8)),
    "conv x32": (lambda: build_model("conv", (3, 32, 32), 10, width=32), False, torch.zeros(2, 3, 32, 32)),
    "resnet20 x1": (
        lambda: build_model("resnet20", (3, 32, 32), 10, width=1, norm="layer"),
        False,
        torch.zeros(2, 3, 32, 32),
    ),
}
METHODS: dict[str, Match] = {
    "weight": weight_matching,
    "weight, 10 restarts": lambda spec, a, b: weight_matching(spec, a, b, restarts=10),
    "sinkhorn": sinkhorn_matching,
    "sinkhorn, unrolled": lambda spec, a, b: sinkhorn_matching(spec, a, b, gradient="unrolled"),
    "frank-wolfe": frank_wolfe_matching,
    "frank-wolfe, no polish": lambda spec, a, b: frank_wolfe_matching(spec, a, b, polish=False),
    "frank-wolfe, 10 restarts": lambda spec, a, b: frank_wolfe_matching(spec, a, b, restarts=10),
}
EPOCHS = 20


def network(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A network, its weights drawn and trained from ``seed``, and an example batch."""
    make, trained, batch = NETWORKS[name]
    torch.manual_seed(seed)
    net = make()
    if trained:
        data, cpu = load_dataset("digits"), torch.device("cpu")
        images, labels = data.train_images, data.train_labels
        train(net, data, images, labels, recipe=RECIPES["mlp"], epochs=EPOCHS, seed=seed, device=cpu)
    return net, batch


def measure(name: str, pairs: int, runs: int) -> list[dict[str, Any]]:
    """One row for each method."""
    nets = [[network(name, 2 * pair + side) for side in range(2)] for pair in range(pairs)]
    spec = trace(nets[0][0][0], (nets[0][0][1],))
    cases = [[{key: value.detach() for key, value in net.state_dict().items()} for net, _ in pair] for pair in nets]
    found: dict[str, list[list[Matching]]] = {method: [[] for _ in cases] for method in METHODS}
    for _ in range(runs):
        for method, match in METHODS.items():
            for (first, second), matchings in zip(cases, found[method], strict=True):
                matchings.append(match(spec, first, second))
    rows = []
    for method, by_pair in found.items():
        gains = [matchings[0].objective - matchings[0].objective_before for matchings in by_pair]
        seconds = statistics.median(matching.seconds for matchings in by_pair for matching in matchings)
        rows.append(
            {
                "network": name,
                "method": method,
                "gain": [round(gain, 4) for gain in gains],
                "mean-gain": round(statistics.mean(gains), 4),
                "seconds": round(seconds, 4),
            }
        )
    return rows


def main() -> None:
    """Measure all networks, or those after ``--only``, whose names are parted by semicolons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    started = time.time()
    rows = []
    for name in options.only.split(";") if options.only else NETWORKS:
        for row in measure(name, options.pairs, options.runs):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.output:
        result = {"experiment": "methods", "threads": torch.get_num_threads(), "rows": rows}
        seeds = list(range(2 * options.pairs))
        save_results(options.output, {**result, "provenance": provenance(bench_command("methods"), seeds, started)})


if __name__ == "__main__":
    main()
