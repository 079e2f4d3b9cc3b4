"""How good weight matching's optima are: ``python -m fedrebasin.simulations.bench.quality --output FILE``.

Two questions. Planted: is a copy with permuted units, without and with noise, put back exactly (100 trials a case)?
Independent: how much objective do the default call and ``restarts=9`` gain over the identity, beside the plain
Algorithm 1 in 10 random orders (``plain.py``), on random initialisations and on networks trained on halves of digits?
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import PermutationSpec, invert, permute, random_perms, trace, weight_matching
from fedrebasin.simulations.bench.matching import pair
from fedrebasin.simulations.bench.plain import plain_weight_matching
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.ends import EndConfig, disjoint_halves, make_model, trained_end
from fedrebasin.simulations.results import provenance, save_results

State = dict[str, Tensor]
_EPOCHS = {"mlp": 30, "conv": 12}
_WIDTHS = {"mlp": 512, "conv": 32}


class Residual(nn.Module):
    """Blocks of an inner layer around one stream, which is as wide as the input."""

    def __init__(self, stream: int = 50, inner: int = 30, blocks: int = 2) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(50, stream), nn.Linear(stream, 30)
        self.up = nn.ModuleList(nn.Linear(stream, inner) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(inner, stream) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, 50)`` to ``(batch, 30)``."""
        x = self.into(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        result: Tensor = self.out(x)
        return result


def plain_net() -> nn.Module:
    """Three hidden layers of 50."""
    return nn.Sequential(
        *(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))
    )


def recovered(make: Callable[[], nn.Module], noise: float, trials: int) -> dict[str, Any]:
    """How many planted copies are put back exactly, by the default call and by plain descent from the identity."""
    ours = plain = level = 0
    for trial in range(trials):
        torch.manual_seed(trial)
        net = make()
        spec = trace(net, (torch.zeros(2, 50),))
        reference = {key: tensor.detach() for key, tensor in net.state_dict().items()}
        noisy = {
            key: tensor + noise * tensor.square().mean().sqrt() * torch.randn_like(tensor)
            for key, tensor in reference.items()
        }
        perms = random_perms(spec, trial)
        model, truth = permute(spec, perms, noisy), invert(spec, perms)
        found = weight_matching(spec, reference, model)
        ours += _same(found.perms, truth)
        level += found.objective >= weight_matching(spec, reference, noisy).objective * (1 - 1e-6)
        plain += _same(plain_weight_matching(spec, reference, model, seed=trial).perms, truth)
    return {"noise": noise, "trials": trials, "recovered": ours, "objective-level": level, "plain-recovered": plain}


def _same(perms: State, truth: State) -> bool:
    return all(bool((perms[key] == one).all()) for key, one in truth.items())


def gains(spec: PermutationSpec, first: State, second: State) -> dict[str, Any]:
    """Objective above the identity's: the default call, restarts, and 10 orders of the plain algorithm."""
    plain = [plain_weight_matching(spec, first, second, seed=seed) for seed in range(10)]
    found = weight_matching(spec, first, second)
    more = weight_matching(spec, first, second, restarts=9)
    start = found.objective_before
    values = [one.objective - start for one in plain]
    return {
        "default": found.objective - start,
        "restarts": more.objective - start,
        "plain-mean": statistics.mean(values),
        "plain-best": max(values),
        "seconds": round(found.seconds, 4),
        "restarts-seconds": round(more.seconds, 4),
        "plain-seconds": round(statistics.mean(one.seconds for one in plain), 4),
    }


def trained_pair(model: str, seed: int, folder: Path) -> tuple[PermutationSpec, State, State]:
    """Two networks trained on the halves of digits as in ``fedrebasin reproduce disjoint``."""
    data = load_dataset("digits", None)
    states = []
    for end, rows in zip("ab", disjoint_halves(data.train_labels, data.classes), strict=True):
        config = EndConfig("digits", data.source, 0.2, model, _WIDTHS[model], "batch", _EPOCHS[model], seed, end)
        states.append(
            trained_end(config, data, rows, folder, device=torch.device("cpu"), progress=lambda line: None)[0]
        )
    return trace(make_model(config, data), (data.normalise(data.test_images[:2]),)), states[0], states[1]


def main() -> None:
    """Measure everything, smallest first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="mlp 3x32,mlp 3x512,conv x32,resnet20 x1,resnet20 x4")
    options = parser.parse_args()
    started = time.time()
    result: dict[str, Any] = {"experiment": "matching-quality", "planted": [], "independent": []}
    for name, make in (("plain", plain_net), ("residual", Residual)):
        for noise in (0.0, 0.2, 0.5):
            result["planted"].append({"network": name, **recovered(make, noise, options.trials)})
            print(json.dumps(result["planted"][-1]), flush=True)
    cases: list[tuple[str, str, int, Callable[[], tuple[PermutationSpec, State, State]]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for model in _EPOCHS:
                label = f"{model} x{_WIDTHS[model]}"
                cases.append((label, "digits", seed, partial(trained_pair, model, seed, Path(folder))))
            for name in options.only.split(","):
                cases.append((name, "random", seed, partial(pair, name, "independent", seed)))
        for name, weights, seed, make_pair in cases:
            row = {"network": name, "weights": weights, "seed": seed, **gains(*make_pair())}
            result["independent"].append(row)
            print(json.dumps(row), flush=True)
    if options.output:
        seeds = list(range(options.seeds))
        save_results(options.output, {**result, "provenance": provenance(bench_command("quality"), seeds, started)})


if __name__ == "__main__":
    main()
