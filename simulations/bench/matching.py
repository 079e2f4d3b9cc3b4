"""Speed of weight matching: ``python -m fedrebasin.simulations.bench.matching --output FILE``.

Each network is matched by ``weight_matching`` and by the plain Algorithm 1 (``plain.py``) in turn; figures are
medians over the runs, in one process. Pairs are independent random initialisations, or a copy with planted
permutations and relative noise 0.2. ``floor`` is one product for each tied axis and one cold assignment for each
permutation, measured in the same run. Memory is the peak of one more ``weight_matching`` above what the process held,
the two models among it: to start it, memory is given back to the system, which a call pays for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import PermutationSpec, permute, random_perms, trace, weight_matching
from fedrebasin.simulations.bench.peak import peak_above, start_peak
from fedrebasin.simulations.bench.plain import plain_weight_matching
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.results import provenance, save_results

State = dict[str, Tensor]


def vgg16() -> nn.Module:
    """CIFAR's VGG16: 13 convolutions with BatchNorm, 512-512-10 linear."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def resnet50() -> nn.Module:
    """torchvision's."""
    import torchvision

    net: nn.Module = torchvision.models.resnet50(weights=None)
    return net


def _mlp(width: int, depth: int = 3) -> nn.Module:
    sizes = [784, *[width] * depth]
    hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def _resnet20(width: int) -> nn.Module:
    return build_model("resnet20", (3, 32, 32), 10, width=width, norm="layer")


#: name: how it is made, an example batch
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp 3x32": (lambda: _mlp(32), torch.zeros(2, 784)),
    "mlp 3x512": (lambda: _mlp(512), torch.zeros(2, 784)),
    "conv x32": (lambda: build_model("conv", (3, 32, 32), 10, width=32), torch.zeros(2, 3, 32, 32)),
    "resnet20 x1": (lambda: _resnet20(1), torch.zeros(2, 3, 32, 32)),
    "resnet20 x4": (lambda: _resnet20(4), torch.zeros(2, 3, 32, 32)),
    "vgg16": (vgg16, torch.zeros(2, 3, 32, 32)),
    "resnet20 x16": (lambda: _resnet20(16), torch.zeros(2, 3, 32, 32)),
    "resnet50": (resnet50, torch.zeros(2, 3, 64, 64)),
    "resnet20 x32": (lambda: _resnet20(32), torch.zeros(2, 3, 32, 32)),
}


def pair(name: str, kind: str, seed: int) -> tuple[PermutationSpec, State, State]:
    """A network's spec, and the two state dicts to match."""
    make, batch = NETWORKS[name]
    torch.manual_seed(2 * seed)
    one = make()
    spec = trace(one, (batch,))
    first = {key: tensor.detach() for key, tensor in one.state_dict().items()}
    if kind == "independent":
        torch.manual_seed(2 * seed + 1)
        return spec, first, {key: tensor.detach() for key, tensor in make().state_dict().items()}
    noisy = {
        key: tensor + 0.2 * tensor.std() * torch.randn_like(tensor)
        if tensor.ndim and tensor.is_floating_point()
        else tensor
        for key, tensor in first.items()
    }
    return spec, first, permute(spec, random_perms(spec, seed), noisy)


def floor_seconds(spec: PermutationSpec, first: State, second: State) -> float:
    """One product for each tied axis and one cold assignment for each permutation."""
    found = plain_weight_matching(spec, first, second, sweeps=1)
    return found.products + found.assignments


def measure(name: str, kind: str, runs: int, seed: int = 0) -> dict[str, Any]:
    """Medians of interleaved runs."""
    spec, first, second = pair(name, kind, seed)
    before = start_peak()
    weight_matching(spec, first, second)
    peak = peak_above(before)
    ours, plain, floors = [], [], []
    for run in range(runs):
        started = time.perf_counter()
        matching = weight_matching(spec, first, second, seed=run)
        ours.append(time.perf_counter() - started)
        floors.append(floor_seconds(spec, first, second))
        plain.append(plain_weight_matching(spec, first, second, seed=run))
    seconds, baseline = statistics.median(ours), statistics.median(one.seconds for one in plain)
    start = matching.objective_before
    return {
        "network": name,
        "pair": kind,
        "parameters": sum(first[key].numel() for key in spec.parameters),
        "seconds": round(seconds, 4),
        "plain-seconds": round(baseline, 4),
        "plain-products": round(statistics.median(one.products for one in plain), 4),
        "plain-assignments": round(statistics.median(one.assignments for one in plain), 4),
        "plain-solved": [one.solved for one in plain],
        "floor-seconds": round(statistics.median(floors), 4),
        "speed-up": round(baseline / seconds, 2),
        "over-floor": round(seconds / statistics.median(floors), 2),
        "peak-mb": round(peak, 1),
        "gain": matching.objective - start,
        "plain-gain": [one.objective - start for one in plain],
    }


def main() -> None:
    """Measure all networks, or those after ``--only``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pairs", default="independent,planted")
    options = parser.parse_args()
    started = time.time()
    rows = []
    for name in options.only.split(",") if options.only else NETWORKS:
        for kind in options.pairs.split(","):
            rows.append(measure(name, kind, options.runs))
            print(json.dumps(rows[-1]), flush=True)
    if options.output:
        result = {"experiment": "matching", "threads": torch.get_num_threads(), "rows": rows}
        save_results(options.output, {**result, "provenance": provenance(bench_command("matching"), [0], started)})


if __name__ == "__main__":
    main()
