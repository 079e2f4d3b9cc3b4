"""Accuracy of one round under SecAgg+: ``python -m fedrebasin.simulations.bench.secure --output FILE``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.secure import Settings, measure


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    started = time.time()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    results = measure(Settings(), seeds)
    save_results(options.output, {**results, "provenance": provenance(bench_command("secure"), seeds, started)})


if __name__ == "__main__":
    main()
