"""What corrections cost: ``python -m fedrebasin.simulations.bench.corrections --output FILE``.

Two networks with random weights and images stand in for trained ones, because neither decides the cost. ``conv`` of
width 128 is corrected by every method with 5,000 images, ResNet20 of width 4 by REPAIR with 1,000. A row
has the seconds, median over runs, and their ratio to the evaluation of three models (both ends and the merge) on the
same images in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import merge, repair, reset_batchnorm
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, correct
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.results import provenance, save_results

State = dict[str, Tensor]
BATCH = 250
SHAPE = (3, 32, 32)


def case(model: str, images: int, seed: int = 0) -> tuple[nn.Module, list[State], list[Tensor]]:
    """A network, two ends whose BatchNorms fit the images, and the images in batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = list(torch.split(torch.randn(images, *SHAPE, generator=generator), BATCH))
    ends = []
    for end in range(2):
        torch.manual_seed(2 * seed + end)
        net = build_model(model, SHAPE, 10).to(memory_format=torch.channels_last)
        ends.append(reset_batchnorm(net, net.state_dict(), batches[:2]))
    return net, ends, batches


def evaluate(net: nn.Module, states: Sequence[State], batches: Sequence[Tensor]) -> None:
    """Outputs of every model on every batch."""
    net.eval()
    with torch.no_grad():
        for state in states:
            net.load_state_dict(state)
            for batch in batches:
                net(batch)


def seconds(job: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - clock, time.process_time() - processor


def jobs(model: str, images: int, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """``evaluation`` and the corrections by name; REPAIR also without memory and with 4 GiB, and all at once."""
    net, ends, batches = case(model, images)
    merged = merge(ends)
    setting = CorrectionSetting(net, batches)
    found: dict[str, Callable[[], Any]] = {"evaluation": lambda: evaluate(net, [merged, *ends], batches)}
    for name in names:
        found[name] = partial(correct, name, setting, merged, ends)
    if "repair" in names:
        found["repair, memory=0"] = lambda: repair(net, merged, ends, batches, memory=0)
        found["repair, memory=2**32"] = lambda: repair(net, merged, ends, batches, memory=2**32)
    found["repair, all at once"] = lambda: repair(net, merged, ends, batches, sequential=False)
    return found


def measure(model: str, images: int, names: Sequence[str], runs: int) -> list[dict[str, Any]]:
    """A row for each job; runs are interleaved, so that a busy machine is busy for all."""
    to_do = jobs(model, images, names)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in to_do}
    for _ in range(runs):
        for name, job in to_do.items():
            found[name].append(seconds(job))
    rows = []
    for name, times in found.items():
        clock, processor = (statistics.median(column) for column in zip(*times, strict=True))
        base_clock, base = (statistics.median(column) for column in zip(*found["evaluation"], strict=True))
        row = {"model": model, "images": images, "threads": torch.get_num_threads(), "job": name}
        row |= {"seconds": round(clock, 2), "cpu-seconds": round(processor, 2)}
        row |= {"times-evaluation": round(clock / base_clock, 2), "cpu-times-evaluation": round(processor / base, 2)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure with one thread, then with two, or as ``--threads`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--only", default="", help="corrections with commas between")
    options = parser.parse_args()
    started = time.time()
    names = options.only.split(",") if options.only else [name for name in CORRECTIONS if name != "bias-normalisation"]
    rows = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        rows += measure("conv", options.images, names, options.runs)
        rows += measure(
            "resnet20", min(1000, options.images), [name for name in names if name == "repair"], options.runs
        )
    if options.output:
        result = {"experiment": "corrections-cost", "runs": options.runs, "rows": rows}
        save_results(options.output, {**result, "provenance": provenance(bench_command("corrections"), [0], started)})


if __name__ == "__main__":
    main()
