"""Two tasks in one trunk: ``python -m fedrebasin.simulations.bench.heads --output FILE``.

Two MLPs train apart on digits, one on the classes 0 to 4, the other on 5 to 9, from initialisations of their own. Their
trunks are merged up to some layer, each keeps its head, and each is tested on its own classes. A row holds the mean of
both tasks' test accuracy and loss, for every seed. Activation
matching and zipping see 500 training images without labels.
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
from torch import Tensor

from fedrebasin import activation_matching, check_spec, merge, merge_trunks, permute, trace, trunk_tensors, zip_trunks
from fedrebasin.simulations.baselines import score
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.settings import Settings, resolve
from fedrebasin.simulations.silo import initial_model, train_round
from fedrebasin.simulations.training import predict

#: Layers of the MLP after which the heads begin.
LAYERS = ("1", "3", "5")
IMAGES = 500


def task(data: Dataset, first: int, count: int) -> Dataset:
    """The data of some classes, relabelled from 0."""
    parts: dict[str, Any] = {"classes": count}
    for part in ("train", "test"):
        labels: Tensor = getattr(data, f"{part}_labels")
        rows = (labels >= first) & (labels < first + count)
        parts[f"{part}_images"] = getattr(data, f"{part}_images")[rows]
        parts[f"{part}_labels"] = labels[rows] - first
    return dataclasses.replace(data, **parts)


def rows_of(data: Dataset, settings: Settings, seed: int) -> Iterator[tuple[str, str, dict[str, float]]]:
    """How the trunks were merged, up to which layer, and the mean of both tasks' scores."""
    half = data.classes // 2
    tasks = [task(data, first, half) for first in (0, half)]
    nets = []
    for owner, own in enumerate(tasks):
        net = initial_model(settings, own, seed=seed, owner=owner)
        rows = torch.arange(len(own.train_labels))
        train_round(net, settings, own, rows, seed=seed, owner=owner, server_round=1, epochs=settings.epochs)
        nets.append(net)
    example = (data.normalise(data.train_images[:2]),)
    spec = check_spec(nets[0], trace(nets[0], example), example, seed=seed)
    ends = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    batches = [data.normalise(data.train_images[order])]

    def measured(states: list[dict[str, Tensor]]) -> dict[str, float]:
        found = []
        for own, net, state in zip(tasks, nets, states, strict=True):
            net.load_state_dict(state)
            found.append(score(predict(net, own, own.test_images, device=torch.device("cpu")), own.test_labels))
        return {key: sum(one[key] for one in found) / len(found) for key in ("loss", "accuracy")}

    yield "alone", "-", measured(ends)
    for until in LAYERS:
        names = trunk_tensors(spec, until)
        plain = merge([{name: state[name] for name in names} for state in ends])
        yield "plain average", until, measured([{**state, **plain} for state in ends])
        yield "permuted, by weights", until, measured(merge_trunks([spec] * 2, ends, until=until))
        found = activation_matching(spec, nets[0], ends[0], ends[1], batches).perms
        moved = permute(spec, found, ends[1])
        trunk = merge([{name: state[name] for name in names} for state in (ends[0], moved)])
        yield "permuted, by activations", until, measured([{**state, **trunk} for state in (ends[0], moved)])
        yield "zipped", until, measured(zip_trunks([spec] * 2, nets[0], ends, batches, until=until))


def main() -> None:
    """Measure every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    started, settings = time.time(), resolve(Settings(data="digits", width=options.width))
    data = load_dataset("digits", None)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for seed in range(options.seeds):
        for how, until, found in rows_of(data, settings, seed):
            row = rows.setdefault((how, until), {"merge": how, "until": until, "loss": [], "accuracy": []})
            row["loss"].append(round(found["loss"], 4))
            row["accuracy"].append(round(found["accuracy"], 4))
            print(json.dumps({"seed": seed, **row}), flush=True)
    if options.output:
        result = {"experiment": "heads", "data": "digits", "model": settings.model, "width": options.width}
        about = provenance(bench_command("heads"), list(range(options.seeds)), started)
        save_results(options.output, {**result, "rows": list(rows.values()), "provenance": about})


if __name__ == "__main__":
    main()
