"""Learned alignment as a start for weight matching: ``python -m fedrebasin.simulations.bench.learned --output FILE``.

After Navon et al. (ICML 2024), "Equivariant Deep Weight Space Alignment" (Deep-Align), in small: a siamese network over
the hidden units of MLPs, each a node whose edges are the weights, gives every unit a vector; products of the vectors of
two models are the similarity that one assignment a layer turns into permutations. It is trained on a population made on
the spot: to undo a planted permutation under noise (cross-entropy), and to raise the matching objective of pairs that
trained apart (through Sinkhorn's iteration). Populations are those of the paper's kind: classifiers (of digits) and
functions (sine waves, two networks a wave). Held-out pairs are matched from every start. The gain is over the identity,
the barrier that of test loss in the middle between the ends; milliseconds are one pair's, without the training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedrebasin import identity_perms, interpolate, permute, trace, weight_matching
from fedrebasin.assignment import solve_assignment
from fedrebasin.matching.result import inner_product
from fedrebasin.simulations.bench.learned_population import WIDTH, Population, State, digits, sines
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.results import provenance, save_results

Perms = dict[str, Tensor]
DIM, ROUNDS, PAIRS, BATCH = 64, 3, 20, 16
#: Index of the first layer and of the second in the networks, which are the names of their permutations.
LAYERS = ("0", "2")


class UnitNetwork(nn.Module):
    """A vector for each hidden unit, which moves with the unit when the units of either layer are permuted."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs + 1, DIM), nn.Linear(outputs + 1, DIM)
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Linear(3 * DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2 * ROUNDS)
        )
        self.heads = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, states: State) -> tuple[Tensor, Tensor]:
        """Vectors of length one: ``(networks, units, DIM)`` for each layer."""
        between = states["2.weight"] * WIDTH**0.5
        one = self.first(torch.cat([states["0.weight"], states["0.bias"].unsqueeze(-1)], -1))
        two = self.second(torch.cat([states["4.weight"].transpose(-1, -2), states["2.bias"].unsqueeze(-1)], -1))
        for step in range(ROUNDS):
            to_one, to_two = between.transpose(-1, -2) @ two / WIDTH**0.5, between @ one / WIDTH**0.5
            old = one
            one = one + self.steps[2 * step](torch.cat([one, to_one, one.mean(-2, keepdim=True).expand_as(one)], -1))
            two = two + self.steps[2 * step + 1](
                torch.cat([two, to_two, old.mean(-2, keepdim=True).expand_as(two)], -1)
            )
        return F.normalize(self.heads[0](one), dim=-1), F.normalize(self.heads[1](two), dim=-1)

    def similarity(self, first: State, second: State) -> list[Tensor]:
        """Of the first networks' units with the second ones': ``(networks, units, units)`` for each layer."""
        pairs = zip(self(first), self(second), strict=True)
        return [self.scale * one @ other.transpose(-1, -2) for one, other in pairs]


def permuted(states: State, one: Tensor, two: Tensor) -> State:
    """Networks with their units permuted by soft or hard matrices ``(networks, units, units)``."""
    return {
        "0.weight": one @ states["0.weight"],
        "0.bias": (one @ states["0.bias"].unsqueeze(-1)).squeeze(-1),
        "2.weight": two @ states["2.weight"] @ one.transpose(-1, -2),
        "2.bias": (two @ states["2.bias"].unsqueeze(-1)).squeeze(-1),
        "4.weight": states["4.weight"] @ two.transpose(-1, -2),
        "4.bias": states["4.bias"],
    }


def learn(states: State, steps: int, seed: int) -> UnitNetwork:
    """Train on planted permutations under noise and on pairs of neighbours."""
    torch.manual_seed(seed)
    count = len(states["0.bias"])
    model = UnitNetwork(states["0.weight"].shape[2], states["4.weight"].shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = 2 * torch.randint(count // 2, (BATCH,))
        own = {name: tensor[chosen] for name, tensor in states.items()}
        other = {name: tensor[chosen + 1] for name, tensor in states.items()}
        orders = [torch.rand(BATCH, WIDTH).argsort(1) for _ in LAYERS]
        moves = [torch.eye(WIDTH)[order] for order in orders]
        noisy = {
            name: tensor + torch.rand(BATCH, *[1] * (tensor.ndim - 1)) * tensor.std() * torch.randn_like(tensor)
            for name, tensor in permuted(own, *moves).items()
        }
        planted = model.similarity(noisy, own)
        undone = [
            F.cross_entropy(score.flatten(0, 1), order.flatten()) for score, order in zip(planted, orders, strict=True)
        ]
        shuffled = permuted(other, *moves)
        soft = [_sinkhorn(score) for score in model.similarity(own, shuffled)]
        aligned = permuted(shuffled, soft[0], soft[1])
        gain = sum(
            ((own[name] * aligned[name]).sum() / own[name].norm() / other[name].norm() for name in own), torch.zeros(())
        )
        optimizer.zero_grad()
        torch.autograd.backward(undone[0] + undone[1] - 5 * gain)
        optimizer.step()
        schedule.step()
    return model.eval()


def _sinkhorn(scores: Tensor) -> Tensor:
    for _ in range(10):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()


def rows_of(population: Population, model: UnitNetwork, pairs: Sequence[int], name: str) -> Iterator[dict[str, Any]]:
    """A row for every start, over the held-out pairs."""
    spec = trace(population.net, (population.test(0)[0][:2],))

    @torch.no_grad()
    def predicted(a: State, b: State) -> Perms:
        found = model.similarity(*({k: v.unsqueeze(0) for k, v in state.items()} for state in (a, b)))
        return {layer: solve_assignment(score[0]) for layer, score in zip(LAYERS, found, strict=True)}

    ways: dict[str, Callable[[State, State], Perms]] = {
        "no alignment": lambda a, b: identity_perms(spec),
        "default start": lambda a, b: weight_matching(spec, a, b).perms,
        "default start, 10 restarts": lambda a, b: weight_matching(spec, a, b, restarts=10).perms,
        "identity as start": lambda a, b: weight_matching(spec, a, b, init=identity_perms(spec)).perms,
        "learned alone": predicted,
        "learned start": lambda a, b: weight_matching(spec, a, b, init=predicted(a, b)).perms,
    }
    for way, find in ways.items():
        gains, barriers, times = [], [], []
        for pair in pairs:
            a, b = population.one(2 * pair), population.one(2 * pair + 1)
            started = time.perf_counter()
            perms = find(a, b)
            times.append(time.perf_counter() - started)
            moved = permute(spec, perms, b)
            gains.append(inner_product(spec, a, moved) - inner_product(spec, a, b))
            x, y = population.test(pair)
            losses = [
                float(population.loss(functional_call(population.net, state, x), y))
                for state in (a, interpolate(a, moved, 0.5), moved)
            ]
            barriers.append(losses[1] - (losses[0] + losses[2]) / 2)
        yield {
            "population": name,
            "start": way,
            "gain": statistics.mean(gains),
            "barrier": statistics.mean(barriers),
            "milliseconds": 1e3 * statistics.median(times),
        }


def main() -> None:
    """Make both populations, learn on each, match held-out pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    started = time.time()
    result: dict[str, Any] = {"experiment": "learned", "networks": options.networks, "steps": options.steps, "rows": []}
    for name, make in (("digits classifiers", digits), ("sine functions", sines)):
        population = make(options.networks, 0)
        begun = time.perf_counter()
        kept = {key: tensor[: options.networks - 2 * PAIRS] for key, tensor in population.states.items()}
        model = learn(kept, options.steps, 0)
        seconds = time.perf_counter() - begun
        pairs = range(options.networks // 2 - PAIRS, options.networks // 2)
        for row in rows_of(population, model, pairs, name):
            result["rows"].append({**row, "training-seconds": round(seconds, 1)})
            print(json.dumps(result["rows"][-1]), flush=True)
    if options.output:
        save_results(options.output, {**result, "provenance": provenance(bench_command("learned"), [0], started)})


if __name__ == "__main__":
    main()
