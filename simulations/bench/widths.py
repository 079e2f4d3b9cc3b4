"""Two widths merged once, in one process: ``python -m fedrebasin.simulations.bench.widths``.

Two clients train MLPs of different width apart on digits, 20% and 80% of each half of the classes. A row holds the test
accuracy and loss of every seed, for the wide client's model and the narrow one's. A plain average does not exist.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedrebasin import check_widths, merge_widths
from fedrebasin.simulations.baselines import score
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.partition import parse_partition, partition_rows
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.settings import Settings, resolve
from fedrebasin.simulations.silo import initial_model, train_round
from fedrebasin.simulations.training import predict

#: how tables call it: the options of merge_widths
WAYS: dict[str, dict[str, Any]] = {
    "pad": {"unmatched": "pad"},
    "fold above 0.5": {"unmatched": "fold", "fold_above": 0.5},
    "fold above 0.1": {"unmatched": "fold", "fold_above": 0.1},
    "transport": {"unmatched": "transport"},
}


def rows_of(data: Dataset, settings: Settings, widths: tuple[int, int], seed: int) -> Iterator[tuple[str, str, Any]]:
    """How, which client, and the score of its model."""
    parts = partition_rows(data.train_labels, data.classes, 2, parse_partition("biased:0.2"), seed=seed)
    nets = []
    for owner, width in enumerate(widths):
        own = dataclasses.replace(settings, width=width)
        net = initial_model(own, data, seed=seed, owner=owner)
        train_round(net, own, data, parts[owner], seed=seed, owner=owner, server_round=1, epochs=own.epochs)
        nets.append(net)
    specs = check_widths(nets[0], nets[1], (data.normalise(data.train_images[:2]),), seed=seed)
    ends = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]
    merges = {way: merge_widths(specs, ends, **options) for way, options in WAYS.items()}
    for how, states in {"alone": ends, **merges}.items():
        for client, net, state in zip(("wide", "narrow"), nets, states, strict=True):
            net.load_state_dict(state)
            logits = predict(net, data, data.test_images, device=torch.device("cpu"))
            yield how, client, score(logits, data.test_labels)


def main() -> None:
    """Measure every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--widths", type=int, nargs=2, default=(512, 256))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    started, settings = time.time(), resolve(Settings(data="digits"))
    data, widths = load_dataset("digits", None), (options.widths[0], options.widths[1])
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for seed in range(options.seeds):
        for how, client, found in rows_of(data, settings, widths, seed):
            row = rows.setdefault((how, client), {"merge": how, "client": client, "loss": [], "accuracy": []})
            row["loss"].append(round(found["loss"], 4))
            row["accuracy"].append(round(found["accuracy"], 4))
            print(json.dumps({"seed": seed, **row}), flush=True)
    if options.output:
        result = {"experiment": "widths", "data": "digits", "model": settings.model, "widths": list(widths)}
        about = provenance(bench_command("widths"), list(range(options.seeds)), started)
        save_results(options.output, {**result, "rows": list(rows.values()), "provenance": about})


if __name__ == "__main__":
    main()
