"""Merging files that memory does not hold: ``python -m fedrebasin.simulations.bench.merge --output FILE``.

Two files of a deep convolutional network are made in a temporary folder, tensor by tensor: random weights, and the same
in another order of units with noise. ``fedrebasin merge --memory`` merges them in a process of its own, whose peak
resident memory is what the kernel says of it when it ends. A smaller pair is merged with and without the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import PermutationSpec, random_perms, trace
from fedrebasin.permute import permute_tensor
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.stored import StoredState
from fedrebasin.stored_write import write_state

#: standard deviation of the noise on the second model, in units of that of the weights
NOISE = 0.5


def network(layers: int, channels: int) -> nn.Module:
    """3x3 convolutions one after the other, without weights."""
    with torch.device("meta"):
        inner = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
        stack = [nn.Conv2d(3, channels, 3, padding=1), *inner, nn.Conv2d(channels, 10, 3, padding=1)]
        return nn.Sequential(*(module for conv in stack for module in (conv, nn.ReLU())))


def make_pair(folder: Path, layers: int, channels: int) -> PermutationSpec:
    """Write ``a.safetensors``, ``b.safetensors`` and ``spec.json``."""
    net = network(layers, channels)
    spec = trace(net, (torch.zeros(1, 3, 4, 4, device="meta"),))
    spec.save(folder / "spec.json")
    perms = random_perms(spec, 1)
    like = net.state_dict()

    def drawn(*, second: bool) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        noise = torch.Generator().manual_seed(1)
        for name, tensor in like.items():
            values = torch.randn(tensor.shape, generator=generator)
            if second:
                values += NOISE * torch.randn(tensor.shape, generator=noise)
                values = permute_tensor(spec.axes[name], perms, values)
            yield name, values

    write_state(folder / "a.safetensors", like, drawn(second=False))
    write_state(folder / "b.safetensors", like, drawn(second=True))
    return spec


#: Runs the command, then prints its peak: what the system counts for a child holds its parent's, from before ``exec``.
_CHILD = """
import sys
from pathlib import Path
from fedrebasin.simulations import cli
status = cli.run(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in lines if line.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


def run_merge(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Merge the pair in a process of its own: its seconds and its peak resident memory in GB."""
    files = [str(folder / f"{one}.safetensors") for one in ("a", "b")]
    output = ["--output", str(folder / f"{name}.safetensors"), "--spec", str(folder / "spec.json"), "--no-check"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, "merge", *files, *output, *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read().split()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"merge failed with status {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu-seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak-gb": round(int(said[-1]) * 1024 / 1e9, 3),
    }


def residue(folder: Path, name: str) -> float:
    """``|merged - a| / |a|``: half of the noise where every unit was found."""
    first, merged = StoredState(folder / "a.safetensors"), StoredState(folder / f"{name}.safetensors")
    squares = [(float((merged[key] - first[key]).square().sum()), float(first[key].square().sum())) for key in first]
    return float((sum(one for one, _ in squares) / sum(other for _, other in squares)) ** 0.5)


def measure(layers: int, channels: int, memory: str, *, held: bool) -> dict[str, Any]:
    """One row: the merge under the limit and, if ``held``, without one."""
    with tempfile.TemporaryDirectory(prefix="fedrebasin-bench-") as name:
        folder = Path(name)
        spec = make_pair(folder, layers, channels)
        row: dict[str, Any] = {
            "layers": layers,
            "channels": channels,
            "perms": len(spec.perm_shapes),
            "file-gb": round((folder / "a.safetensors").stat().st_size / 1e9, 3),
            "largest-tensor-gb": round(4 * max(entry.numel() for entry in network(1, channels).parameters()) / 1e9, 4),
            "memory": memory,
            "limited": run_merge(folder, "limited", "--memory", memory),
            "noise": NOISE,
            "residue": round(residue(folder, "limited"), 4),
        }
        if held:
            row["unlimited"] = run_merge(folder, "unlimited")
            one, other = StoredState(folder / "limited.safetensors"), StoredState(folder / "unlimited.safetensors")
            row["same-tensors"] = all(torch.equal(one[key], other[key]) for key in one)
        return row


def main() -> None:
    """Measure a small pair both ways and a large one under the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, default=106)
    parser.add_argument("--small-layers", type=int, default=13)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--small-memory", default="1.1GB")
    options = parser.parse_args()
    started = time.time()
    rows = []
    for layers, memory, held in (
        (options.small_layers, options.small_memory, True),
        (options.layers, options.memory, False),
    ):
        if layers:
            rows.append(measure(layers, options.channels, memory, held=held))
            print(json.dumps(rows[-1]), flush=True)
    if options.output:
        result = {"experiment": "merge", "threads": torch.get_num_threads(), "rows": rows}
        save_results(options.output, {**result, "provenance": provenance(bench_command("merge"), [0, 1], started)})


if __name__ == "__main__":
    main()
